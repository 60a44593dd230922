"""The host: which interface carries the overlay, firewall rules, subnet.env."""
