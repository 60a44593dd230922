"""The CNI plugin: attaches pods to the overlay network (docs/cni.md).

The plugin finds this node's subnet and MTU, and then runs two other plugins, the *delegate*
(bridge) and its IPAM plugin (host-local), with a configuration that contains them. It is compatible
with flannel's plugin.

A container runtime starts the plugin once or more for each pod, so the plugin must start fast. Its
modules import only leaves that are cheap, and none of ``dataclasses``, ``typing``, ``logging``,
``pathlib`` and ``subprocess``, each of which takes as long as the rest of the start. Only
``install`` may import them: the plugin does not import it. ``tests/cni/test_start.py`` checks this.
Threading: one thread, one command per process.
"""
