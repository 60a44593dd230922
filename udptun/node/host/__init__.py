"""The setup of the host: the choice of the underlay interface, firewall rules, subnet.env."""
