"""Which device holds what: the mesh, the rule table, the hosts."""
