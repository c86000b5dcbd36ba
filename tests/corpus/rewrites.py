REWRITES: dict = {}
