"""Building datasets: resources, worker processes, resuming and retrying, checking a complete one."""
