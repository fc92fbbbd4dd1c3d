"""What happens in a step and around it: state, objectives, optimizer, checkpoints, guards."""
