"""The three networks. They know no mesh, no checkpoint and no schedule."""
