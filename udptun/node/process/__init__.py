"""The forwarder's process: start, adopt or replace it, and keep its routes up to date."""
