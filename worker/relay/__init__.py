"""The relay: publishes overdue requests again, gives up requests that never settle, delivers fulfilments, archives."""
