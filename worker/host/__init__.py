"""Celery as the host: its queues, its tasks, and what keeps their trouble away from the draws."""
