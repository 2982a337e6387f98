"""Edges of a cell as text."""

import pytest

from samjax.peft.edges import (
    Edge,
    edges_text,
    is_search,
    parse_edges,
    parse_sites,
    sites_text,
)


@pytest.mark.parametrize(
    ("text", "edges", "search"),
    [
        ("none+skip_connect", [Edge(("none", "skip_connect"))], True),
        ("skip_connect", [Edge(("skip_connect",))], False),
        ("a=0.25+b=0.75", [Edge(("a", "b"), (0.25, 0.75))], False),
        (
            "0.4*a | 0.6*b=0.5+c=0.5",
            [Edge(("a",), None, 0.4), Edge(("b", "c"), (0.5, 0.5), 0.6)],
            False,
        ),
        ("a|b|c", [Edge(("a",)), Edge(("b",)), Edge(("c",))], True),
        ("a|a+b", [Edge(("a",)), Edge(("a", "b"))], True),
    ],
)
def test_edges(text, edges, search):
    assert list(parse_edges(text)) == edges
    assert parse_edges(edges_text(edges)) == tuple(edges)
    assert is_search(text) is search and is_search(f"x/y: {text}") is search
    assert not parse_sites(text)


def test_nothing_is_a_search_among_all():
    assert is_search("")


def test_sites():
    sites = {"blocks_0/attn/qkv[q,v]": "a=0.5+b=0.5", "blocks_1/attn/qkv[q,v]": "a"}
    assert parse_sites(sites_text(sites)) == sites
    assert not is_search(sites_text(sites))
    assert is_search(sites_text({**sites, "z": "a+b"}))


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (parse_edges, "a=0.5+b", "give each a share, such as a=0.5"),
        (parse_edges, "a=x", "'x' is no positive number"),
        (parse_edges, "a=-1+b=2", "'-1' is no positive number"),
        (parse_edges, "nan*a", "'nan' is no positive number"),
        (parse_edges, "a+b+a", "names 'a' twice for an edge"),
        (parse_sites, "x: a; y", "'y': write SITE: OPERATORS"),
        (parse_sites, "x: a; x: b", "names the site x twice"),
    ],
)
def test_bad_text(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)
