"""What every other package builds on: errors, command line, records, ``SlimPlan``, MACs, latency tables, runners, timing.

Free of torch.
"""
