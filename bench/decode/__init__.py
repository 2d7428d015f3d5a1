"""How fast a decode node's steps are beside plain reading."""
