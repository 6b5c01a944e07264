import pytest

from llmgr_rec.data.prompt_templates import load_templates, parse_template, save_templates
from llmgr_rec.errors import UserError

WHOLE = {
    "behave": "Next? {nodes} {graph}",
    "align": "Which? {text} {nodes}",
    "structure_graph": "{graph}",
    "structure_nodes": "{nodes}",
}


def write(folder, templates):
    file = folder / "prompts.yaml"
    file.write_text("".join(f"{task}: '{text}'\n" for task, text in templates.items()))
    return str(file)


def test_shipped_templates_put_the_constant_first():
    templates = load_templates("default")
    assert set(templates) == set(WHOLE)
    for template in templates.values():
        parts = list(template.segments())
        assert len(parts[0]) > 4 * max(len(constant) for constant in parts[2::2])
        assert parts[-1].strip()


def test_own_file(tmp_path):
    templates = load_templates(write(tmp_path, WHOLE))
    assert list(templates["behave"].segments()) == ["Next? ", "nodes", " ", "graph", ""]


@pytest.mark.parametrize("with_text", [True, False])
def test_optional_part(with_text):
    template = parse_template("behave", "A [[titles {text}! ]]{nodes}[[ end]]", "test")
    expected = ["A titles ", "text", "! ", "nodes", " end"] if with_text else ["A ", "nodes", " end"]
    assert list(template.segments(with_text)) == expected


def test_text_outside_an_optional_part_is_left_out_too():
    assert list(parse_template("behave", "A {text} {nodes}", "test").segments(False)) == ["A  ", "nodes", ""]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (
            "behave",
            "{node} {graph}",
            r"prompts.yaml: template behave has an unknown placeholder {node}, did you mean nodes\?",
        ),
        ("behave", "{nodes} {nodes}", "has {nodes} twice"),
        ("behave", "{text}", "lacks {graph} or {nodes}, so the prompts of all sessions would be the same"),
        ("align", "{nodes}", "template align lacks {text}"),
        ("structure_graph", "{graph} {nodes}", "has {nodes}, which is not available for this task"),
        ("structure_nodes", "none", "template structure_nodes lacks {nodes}"),
    ],
)
def test_bad_template_names_file_task_and_placeholder(tmp_path, task, text, message):
    with pytest.raises(UserError, match=message):
        load_templates(write(tmp_path, {**WHOLE, task: text}))


def test_unknown_task(tmp_path):
    for name, meant in (("behav", "behave"), ("bse", "base")):
        with pytest.raises(UserError, match=rf"prompts\.yaml: unknown task {name}, did you mean {meant}\?"):
            load_templates(write(tmp_path, {**WHOLE, name: "{nodes}"}))


def test_other_templates_are_those_of_the_base(tmp_path):
    own = {"align": WHOLE["align"]}
    for given, base in ((own, "compact"), ({**own, "base": "default"}, "default"), ({"base": "default"}, "default")):
        file = write(tmp_path, given)
        found, expected = load_templates(file), load_templates(base)
        assert list(found) == list(WHOLE)
        assert found["behave"] == expected["behave"]
        assert found["align"].text == given.get("align", expected["align"].text)
        save_templates(file, tmp_path / "complete.yaml")
        complete = load_templates(str(tmp_path / "complete.yaml"))
        assert {task: one.text for task, one in complete.items()} == {task: one.text for task, one in found.items()}
        assert {one.source for one in complete.values()} == {str(tmp_path / "complete.yaml")}
    with pytest.raises(UserError, match=r"base is compat, which is no built-in .*, did you mean compact\?"):
        load_templates(write(tmp_path, {**own, "base": "compat"}))


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"prompt.templates: defualt is neither .* did you mean default\?"):
        load_templates("defualt")
    file = tmp_path / "prompts.yaml"
    file.write_text("behave: [")
    with pytest.raises(UserError, match=r"prompts\.yaml is not valid YAML"):
        load_templates(str(file))
    file.write_text("- behave")
    with pytest.raises(UserError, match=r"must map tasks \(behave, align"):
        load_templates(str(file))
    file.write_text("behave: 3")
    with pytest.raises(UserError, match=r"must map tasks \(behave, align"):
        load_templates(str(file))
