"""The measured paths to the other nodes: probes, verdicts, and which path carries the packets."""
