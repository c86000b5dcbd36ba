"""What every other package stands on: errors, command line, records, ``SlimPlan``, MACs, latency table. Free of torch."""
