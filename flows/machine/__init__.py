"""What a run needs of its machine: bound child processes, slots on devices, disks."""
