"""Brokers: a Redis Stream or a RabbitMQ quorum queue behind one contract, chosen by the URL's scheme."""
