"""Telemetry of each process: logs, traces, metrics, the pulse."""
