"""What tests share: tiny models, exports, bundles, command lines; no test imports another."""
