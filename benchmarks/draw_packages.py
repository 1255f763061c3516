"""Draw the packages and their imports, read from the code, into ARCHITECTURE.md (Mermaid).

    python benchmarks/draw_packages.py [--check]

An arrow is an import; one that follows from two others is left out. With --check nothing is written, and
the exit code is 1 if the page shows another picture than the code.
"""

import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- packages: python benchmarks/draw_packages.py -->\n", "<!-- end of packages -->\n"
STAGES = ("pipelines", "export", "train", "serve")


def packages_of(graph: grimp.ImportGraph) -> set[str]:
    """Return the packages inside the stages, such as train.data."""
    return {module for module in graph.modules if module.count(".") == 1 and graph.find_children(module)}


def nodes_of(graph: grimp.ImportGraph) -> dict[str, str]:
    """Return the box of each module: its package; or, of modules beside packages, above or below them."""
    packages = packages_of(graph)
    below = set()
    for package in packages:
        below |= graph.find_upstream_modules(package, as_package=True)
    nodes = {}
    for module in graph.modules:
        package = ".".join(module.split(".")[:2])
        stage = module.split(".")[0]
        if package in packages:
            nodes[module] = package
        elif any(other.startswith(f"{stage}.") for other in packages):
            nodes[module] = f"{stage} below" if module in below else f"{stage} above"
        else:
            nodes[module] = stage
    return nodes


def edges_between(graph: grimp.ImportGraph) -> set[tuple[str, str]]:
    """Return (importer, imported) pairs of packages, without those that follow from others."""
    nodes = nodes_of(graph)
    edges = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            if nodes[importer] != nodes[imported]:
                edges.add((nodes[importer], nodes[imported]))
    return {edge for edge in edges if not has_path(edges - {edge}, *edge)}


def has_path(edges: set[tuple[str, str]], start: str, goal: str) -> bool:
    reached, ahead = {start}, [start]
    while ahead:
        node = ahead.pop()
        for following in (b for a, b in edges if a == node and b not in reached):
            reached.add(following)
            ahead.append(following)
    return goal in reached


def modules_in(node: str, graph: grimp.ImportGraph) -> list[str]:
    """Return the names of the modules that a box stands for."""
    nodes = nodes_of(graph)
    own = [module for module in graph.modules if nodes[module] == node and not graph.find_children(module)]
    depth = 1 + node.count(".")
    return sorted("/".join(module.split(".")[depth:]) for module in own)


def picture() -> str:
    """Return the Mermaid flow chart, a box for each package with the names of its modules."""
    graph = grimp.build_graph(*STAGES, cache_dir=None)
    edges = edges_between(graph)
    nodes = sorted({node for edge in edges for node in edge})
    key = {node: node.replace(".", "_").replace(" ", "_") for node in nodes}
    lines = ["```mermaid", "flowchart TD"]
    for stage in STAGES:
        lines.append(f"  subgraph {stage}_stage[{stage}]")
        for node in (n for n in nodes if n.split(".")[0].split()[0] == stage):
            title = f"{node.replace('.', '/')}/" if " " not in node else f"{stage}/*.py"
            lines.append(f'    {key[node]}["<b>{title}</b><br>{wrapped(modules_in(node, graph))}"]')
        lines.append("  end")
    lines += [f"  {key[a]} --> {key[b]}" for a, b in sorted(edges)]
    return "\n".join([*lines, "```"]) + "\n"


def wrapped(names: list[str], width: int = 34) -> str:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += name + ", "
    return "<br>".join(lines).rstrip(", ")


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    shown, after = rest.split(END)
    drawn = picture()
    if "--check" in sys.argv:
        return int(shown != drawn)
    PAGE.write_text(before + BEGIN + drawn + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
