"""A step and what is around it: state, objective, optimizer, checkpoint, guards."""
