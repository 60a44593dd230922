"""The control side: the route table, and the snapshots of the table that the workers read."""
