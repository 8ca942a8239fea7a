"""Everything after the broker: consume, settle, answer. `celery -A worker worker` finds the app in worker.celery."""
