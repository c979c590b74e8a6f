"""SGLang without one of its methods."""

BREAK = """
import importlib.abc, importlib.util, sys

class Breaker(importlib.abc.MetaPathFinder):
    '''Takes a method out of SGLang as a new release might.'''
    def find_spec(self, name, path=None, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            owner = getattr(module, {owner!r})
            setattr(owner, {method!r} + "_renamed", owner.__dict__[{method!r}])
            delattr(owner, {method!r})
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Breaker())
"""
