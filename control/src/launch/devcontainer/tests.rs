use super::*;
use crate::model::port_policy::{Allow, ControlPorts, Decision, Policy};
use crate::model::trust::FolderFile;
use proptest::prelude::*;

fn parse(text: &str) -> Devcontainer {
    Devcontainer::parse(text).unwrap()
}

fn is_exposed(declared: &Devcontainer, port: u16) -> bool {
    let policy = Policy::from(&declared.port_forward().unwrap_or_default());
    policy.decide(NonZeroU16::new(port).unwrap(), &ControlPorts::default()) == Decision::Allow
}

/// Returns label and silence of a port, as a registration has them.
fn note(declared: &Devcontainer, port: u16) -> (Option<String>, bool) {
    let port = NonZeroU16::new(port).unwrap();
    let notes = declared.notes();
    let note = notes.iter().rev().find(|note| (note.first..=note.last).contains(&port));
    note.map(|note| (note.label.clone(), note.silent)).unwrap_or_default()
}

#[test]
fn a_typical_file_is_parsed() {
    let declared = parse(
        r#"{
            // For everybody.
            "name": "shop", "image": "node:22",
            "forwardPorts": [3000, 80, "localhost:5432", "db:5432",],
            "portsAttributes": {
                "3000": { "label": "Web", "onAutoForward": "openBrowser", "requireLocalPort": true, "protocol": "https" },
                "9000-9010": { "onAutoForward": "silent", "label": "Workers" },
                "9229": { "onAutoForward": "ignore" },
                ".+/server.js": { "label": "Server" }, /* a regular expression */
            },
            "postCreateCommand": "npm install",
        }"#,
    );
    assert_eq!(declared.image(), Some("node:22"));
    for (port, exposed) in [(3000, true), (80, true), (443, false), (5432, true), (9005, true), (9229, false)]
    {
        assert_eq!(is_exposed(&declared, port), exposed, "{port}");
    }
    assert_eq!(note(&declared, 3000), (Some("Web".to_owned()), false));
    assert_eq!(note(&declared, 9010), (Some("Workers".to_owned()), true));
    assert_eq!(note(&declared, 9011), (None, false));
    let not_used = [
        "forwardPorts: db:5432",
        "portsAttributes: .+/server.js",
        "portsAttributes.3000.protocol",
        "postCreateCommand",
    ];
    assert_eq!(declared.not_used(), not_used);
}

#[test]
fn a_file_without_ports_leaves_the_default() {
    for text in ["{}", r#"{"image": "x"}"#, r#"{"forwardPorts": [3000]}"#, r#"{"forwardPorts": null}"#] {
        let declared = parse(text);
        assert_eq!(declared.port_forward(), None, "{text}");
        assert_eq!(declared.notes(), [], "{text}");
    }
}

#[test]
fn ignoring_other_ports_exposes_named_ports_only() {
    let declared = parse(
        r#"{"forwardPorts": [3000, 81], "otherPortsAttributes": {"onAutoForward": "ignore"},
            "portsAttributes": {"4000": {"label": "x"}, "5000-5002": {}, "5001": {"onAutoForward": "ignore"}, "1-99": {}}}"#,
    );
    for (port, exposed) in [
        (3000, true),
        (81, true),
        (80, false),
        (4000, true),
        (5000, true),
        (5001, false),
        (5002, true),
        (6000, false),
    ] {
        assert_eq!(is_exposed(&declared, port), exposed, "{port}");
    }
}

#[test]
fn a_port_overrides_a_range_and_a_narrow_range_overrides_a_wide_one() {
    let declared = parse(
        r#"{"otherPortsAttributes": {"label": "other", "onAutoForward": "silent"}, "portsAttributes": {
            "1000-9000": {"label": "wide", "onAutoForward": "ignore"},
            "2000-2100": {"onAutoForward": "notify"},
            "2050": {"label": "one"}}}"#,
    );
    assert_eq!(note(&declared, 2050), (Some("one".to_owned()), false));
    assert_eq!(note(&declared, 2000), (Some("wide".to_owned()), false));
    assert_eq!(note(&declared, 9999), (Some("other".to_owned()), true));
    assert!(is_exposed(&declared, 2050) && is_exposed(&declared, 2000) && !is_exposed(&declared, 1500));
}

#[test]
fn a_port_in_forward_ports_is_exposed_even_if_a_range_ignores_it() {
    let declared =
        parse(r#"{"forwardPorts": [3000], "portsAttributes": {"3000-3010": {"onAutoForward": "ignore"}}}"#);
    assert!(is_exposed(&declared, 3000) && !is_exposed(&declared, 3001));
}

#[test]
fn later_entries_of_a_label_override_earlier_ones() {
    let declared = from_metadata(
        r#"[{"id": "ghcr.io/x/node:1", "customizations": {}},
            {"forwardPorts": [80], "portsAttributes": {"3000": {"label": "a", "onAutoForward": "silent"}},
             "otherPortsAttributes": {"onAutoForward": "ignore"}},
            {"forwardPorts": [81], "portsAttributes": {"3000": {"label": "b"}},
             "otherPortsAttributes": {"label": "rest"}, "customizations": {}}]"#,
        None,
    )
    .unwrap();
    assert!(is_exposed(&declared, 80) && is_exposed(&declared, 81) && is_exposed(&declared, 5000));
    // Entries are replaced as a whole: `silent` was in the entry that is replaced.
    assert_eq!(note(&declared, 3000), (Some("b".to_owned()), false));
    assert_eq!(note(&declared, 5000), (Some("rest".to_owned()), false));
    assert_eq!(declared.not_used(), ["customizations"]);
    assert_eq!(from_metadata(r#"{"forwardPorts": [80]}"#, None).unwrap(), parse(r#"{"forwardPorts": [80]}"#));
    assert_eq!(from_metadata(" ", None).unwrap(), Devcontainer::default());
}

/// The label of an image and the file of a folder, which both have port 3000, and each another port.
const METADATA: &str = r#"[{"forwardPorts": [80], "otherPortsAttributes": {"onAutoForward": "ignore"},
    "portsAttributes": {"3000": {"label": "image", "onAutoForward": "ignore"}, "9229": {"label": "debug"}},
    "customizations": {}}]"#;
const FOLDER: &str =
    r#"{"forwardPorts": [81], "portsAttributes": {"3000": {"label": "folder"}}, "runArgs": []}"#;

#[test]
fn a_folder_overrides_the_image_port_by_port() {
    let folder = || parse(FOLDER);
    let both = exposure(None, None, from_metadata(METADATA, None).unwrap(), folder());
    let declared = from_metadata(METADATA, None).unwrap().merge(folder());
    assert_eq!((&both.policy, &both.notes), (&declared.port_forward(), &declared.notes()));
    let policy = Policy::from(&both.policy.unwrap());
    for (port, exposed) in [(80, true), (81, true), (3000, true), (9229, true), (5000, false)] {
        let decision = policy.decide(NonZeroU16::new(port).unwrap(), &ControlPorts::default());
        assert_eq!(decision == Decision::Allow, exposed, "{port}");
    }
    assert_eq!(note(&declared, 3000), (Some("folder".to_owned()), false));
    assert_eq!(note(&declared, 9229), (Some("debug".to_owned()), false));
    assert_eq!(both.not_used, ["customizations", "runArgs"]);
    // Without any source the default applies, and one source alone applies as a whole.
    assert_eq!(exposure(None, None, parse("{}"), parse("{}")), Exposure::default());
    let alone = exposure(None, None, parse("{}"), folder());
    assert_eq!((alone.policy, alone.notes), (folder().port_forward(), folder().notes()));
}

#[test]
fn options_replace_labels_and_labels_replace_files_except_for_notes() {
    let only = |port: u16| {
        let ports = [NonZeroU16::new(port).unwrap()].into();
        PortForward { allow: Allow::Ports(ports), ..PortForward::default() }
    };
    let exposed = |options, labels| {
        let declared = exposure(options, labels, from_metadata(METADATA, None).unwrap(), parse(FOLDER));
        assert_eq!(declared.notes, from_metadata(METADATA, None).unwrap().merge(parse(FOLDER)).notes());
        declared.policy
    };
    assert_eq!(exposed(Some(only(1)), Some(only(2))), Some(only(1)));
    assert_eq!(exposed(None, Some(only(2))), Some(only(2)));
}

#[test]
fn a_build_replaces_an_image() {
    let build = |text: &str| {
        let declared = parse(r#"{"image": "x"}"#).merge(parse(text));
        assert_eq!(declared.image(), None);
        let build = declared.build().unwrap();
        (build.dockerfile.display().to_string(), build.context.display().to_string())
    };
    let own = |dockerfile: &str, context: &str| (dockerfile.to_owned(), context.to_owned());
    assert_eq!(build(r#"{"build": {"dockerfile": "Dockerfile", "context": ".."}}"#), own("Dockerfile", ".."));
    assert_eq!(build(r#"{"dockerFile": "Old", "context": "x"}"#), own("Old", "x"));
    assert_eq!(build(r#"{"build": {"dockerfile": "D"}}"#), own("D", "."));
    assert_eq!(parse(r#"{"build": {"dockerfile": "D", "args": {}}}"#).not_used(), ["build.args"]);
}

#[test]
fn errors_name_the_invalid_field() {
    let wrong = |text: &str| Devcontainer::parse(text).unwrap_err().to_string();
    assert_eq!(wrong("[]"), "it must be an object");
    assert_eq!(wrong("{\n\"a\": x}"), "it is not JSON: unexpected token at line 2 column 6");
    assert_eq!(wrong(r#"{"forwardPorts": 3000}"#), "forwardPorts must be a list of ports");
    assert_eq!(wrong(r#"{"forwardPorts": [70000]}"#), "forwardPorts must be a list of ports from 1 to 65535");
    assert_eq!(wrong(r#"{"portsAttributes": []}"#), "portsAttributes must be an object");
    assert_eq!(wrong(r#"{"portsAttributes": {"1": 2}}"#), "portsAttributes.1 must be an object");
    assert_eq!(
        wrong(r#"{"portsAttributes": {"1": {"label": 2}}}"#),
        "portsAttributes.1.label must be a string"
    );
    assert_eq!(wrong(r#"{"image": 5}"#), "image must be a string that is not empty");
    assert_eq!(wrong(&" ".repeat(BYTES_MAX + 1)), "it is longer than 1048576 bytes");
    assert_eq!(
        from_metadata("[1]", None).unwrap_err().to_string(),
        "it must be an object, or a list of objects"
    );
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(wrong(&deep).starts_with("it is not JSON: maximum nesting depth exceeded"));
    let many: Vec<String> = (1..=513).map(|port| format!("\"{port}\": {{}}")).collect();
    let many = format!("{{\"portsAttributes\": {{{}}}}}", many.join(","));
    assert_eq!(wrong(&many), "portsAttributes must be an object of at most 512 entries");
    assert_eq!(from_metadata(&many, None).unwrap_err().to_string(), wrong(&many));
}

#[test]
fn a_folder_has_its_file_in_one_of_two_places() {
    let folder = tempfile::tempdir().unwrap();
    let read = || Devcontainer::read(folder.path());
    assert_eq!(read(), Ok(None));
    std::fs::write(folder.path().join(".devcontainer.json"), r#"{"image": "second"}"#).unwrap();
    assert_eq!(read().unwrap().unwrap().devcontainer.image(), Some("second"));
    let place = folder.path().join(".devcontainer");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("devcontainer.json"), r#"{"build": {"dockerfile": "D", "context": ".."}}"#)
        .unwrap();
    let first = read().unwrap().unwrap();
    assert_eq!(first.file, FolderFile::Devcontainer);
    let first = first.devcontainer;
    assert_eq!(first.build().unwrap().dockerfile, place.join("D"));
    assert_eq!(first.build().unwrap().context, place.join(".."));
    std::fs::write(place.join("devcontainer.json"), "{").unwrap();
    let error = read().unwrap_err().to_string();
    let named = format!("{} cannot be used: it is not JSON", place.join("devcontainer.json").display());
    assert!(error.starts_with(&named), "{error}");
    std::fs::remove_file(place.join("devcontainer.json")).unwrap();
    std::fs::create_dir(place.join("devcontainer.json")).unwrap();
    assert!(read().unwrap_err().to_string().ends_with("it is not a regular file"));
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused_without_a_panic(text in "[{}\\[\\]\"a-zA-Z:,0-9 /*-]{0,80}") {
        let _ = Devcontainer::parse(&text);
        let _ = from_metadata(&text, None);
    }

    #[test]
    fn any_entries_yield_a_policy_and_notes(
        entries in proptest::collection::vec((1u16.., 0u16..3000, 0usize..4), 0..6), other in 0usize..4
    ) {
        let word = |at: usize| ["notify", "silent", "ignore", "unknown"][at];
        let entries: Vec<String> = entries
            .iter()
            .map(|(first, more, what)| {
                let last = first.saturating_add(*more);
                format!(r#""{first}-{last}": {{"onAutoForward": "{}", "label": "{more}"}}"#, word(*what))
            })
            .collect();
        let text = format!(
            r#"{{"forwardPorts": [80, 9229], "portsAttributes": {{{}}}, "otherPortsAttributes": {{"onAutoForward": "{}"}}}}"#,
            entries.join(","), word(other)
        );
        let declared = parse(&text);
        let sent = serde_json::to_value(declared.port_forward()).unwrap();
        let arrived = if sent.is_null() { None } else { Some(PortForward::from_value(&sent).unwrap()) };
        prop_assert_eq!(arrived, declared.port_forward());
        let label = declared.ports_as_metadata().unwrap().to_string();
        let read_back = from_metadata(&label, None).unwrap();
        prop_assert_eq!((read_back.port_forward(), read_back.notes()), (declared.port_forward(), declared.notes()));
    }
}
