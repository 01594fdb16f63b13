"""How griffe reads the package: shapes as they are written, and what a class says of its attributes at each of them."""

import ast
from typing import Any

from griffe import Attribute, Class, Docstring, DocstringSectionAttributes, Extension, Function, get_expression


class Docstrings(Extension):
    """Read by mkdocstrings, which finds it by this file's path."""

    # A shape is a string, which griffe would read as a type in quotes: "out *window" as a product.
    def on_function_instance(self, *, node: ast.FunctionDef, func: Function, **kwargs: Any) -> None:
        parent = func.parent or func.module
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in [*arguments, node.args.vararg, node.args.kwarg]:
            if argument is not None:
                annotation = get_expression(argument.annotation, parent, parse_strings=False)
                func.parameters[argument.arg].annotation = annotation
        func.returns = get_expression(node.returns, parent, parse_strings=False)

    def on_attribute_instance(self, *, node: ast.AST, attr: Attribute, **kwargs: Any) -> None:
        if isinstance(node, ast.AnnAssign):
            attr.annotation = get_expression(node.annotation, attr.parent or attr.module, parse_strings=False)

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        for section in cls.docstring.parse("google") if cls.docstring else ():
            if isinstance(section, DocstringSectionAttributes):
                for described in section.value:
                    if described.name not in cls.members:
                        raise ValueError(f"{cls.path}: its docstring describes {described.name}, which is not there")
                    attribute = cls.members[described.name]
                    attribute.docstring = Docstring(described.description, parent=attribute)
