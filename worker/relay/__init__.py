"""The relay: publishes overdue requests again, gives up requests that never settle, archives old ones."""
