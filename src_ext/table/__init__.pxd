"""The route table and the snapshots of it that the workers read: the control side."""
