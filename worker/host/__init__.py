"""Celery as the host: its queues, its tasks, and the walls between their faults and the draws."""
