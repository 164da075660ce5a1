"""`cskd launch`: the files with which a cluster runs both stages. Workers are stateless, so there is no engine in here: each
file starts `cskd cache-teacher` or `cskd train` as a user would, and says to the cluster what may be started again."""
