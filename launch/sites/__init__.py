"""Runs over sites that are not in this process: on machines of their own, or in a simulation on this one."""
