"""The firewall of the host: our masquerade and forward rules, and other programs' rules that drop
packets of the overlay."""
