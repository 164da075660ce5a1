"""The shipped configs, installed as `cskd.configs`: `importlib.resources.files("cskd.configs")` lists them."""
