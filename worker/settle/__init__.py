"""From a delivery to a result: the consumer, its lanes, and the one transaction that writes."""
