use super::*;
use crate::model::port_policy::{Allow, ControlPorts, Decision, Policy};
use crate::model::trust::FolderFile;
use proptest::prelude::*;

fn parse(text: &str) -> Devcontainer {
    Devcontainer::parse(text).unwrap()
}

fn is_exposed(said: &Devcontainer, port: u16) -> bool {
    let policy = Policy::from(&said.port_forward().unwrap_or_default());
    policy.decide(NonZeroU16::new(port).unwrap(), &ControlPorts::default()) == Decision::Allow
}

/// Label and silence of a port, as a registration would tell them.
fn note(said: &Devcontainer, port: u16) -> (Option<String>, bool) {
    let port = NonZeroU16::new(port).unwrap();
    let notes = said.notes();
    let note = notes.iter().rev().find(|note| (note.first..=note.last).contains(&port));
    note.map(|note| (note.label.clone(), note.silent)).unwrap_or_default()
}

#[test]
fn a_file_as_people_write_it_is_read() {
    let said = parse(
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
    assert_eq!(said.image(), Some("node:22"));
    for (port, exposed) in [(3000, true), (80, true), (443, false), (5432, true), (9005, true), (9229, false)]
    {
        assert_eq!(is_exposed(&said, port), exposed, "{port}");
    }
    assert_eq!(note(&said, 3000), (Some("Web".to_owned()), false));
    assert_eq!(note(&said, 9010), (Some("Workers".to_owned()), true));
    assert_eq!(note(&said, 9011), (None, false));
    let not_used = [
        "forwardPorts: db:5432",
        "portsAttributes: .+/server.js",
        "portsAttributes.3000.protocol",
        "postCreateCommand",
    ];
    assert_eq!(said.not_used(), not_used);
}

#[test]
fn a_file_that_says_nothing_of_ports_leaves_the_default() {
    for text in ["{}", r#"{"image": "x"}"#, r#"{"forwardPorts": [3000]}"#, r#"{"forwardPorts": null}"#] {
        let said = parse(text);
        assert_eq!(said.port_forward(), None, "{text}");
        assert_eq!(said.notes(), [], "{text}");
    }
}

#[test]
fn ignoring_all_others_leaves_what_is_named() {
    let said = parse(
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
        assert_eq!(is_exposed(&said, port), exposed, "{port}");
    }
}

#[test]
fn a_port_of_its_own_counts_before_a_range_and_a_narrow_range_before_a_wide_one() {
    let said = parse(
        r#"{"otherPortsAttributes": {"label": "other", "onAutoForward": "silent"}, "portsAttributes": {
            "1000-9000": {"label": "wide", "onAutoForward": "ignore"},
            "2000-2100": {"onAutoForward": "notify"},
            "2050": {"label": "one"}}}"#,
    );
    assert_eq!(note(&said, 2050), (Some("one".to_owned()), false));
    assert_eq!(note(&said, 2000), (Some("wide".to_owned()), false));
    assert_eq!(note(&said, 9999), (Some("other".to_owned()), true));
    assert!(is_exposed(&said, 2050) && is_exposed(&said, 2000) && !is_exposed(&said, 1500));
}

#[test]
fn a_port_that_is_to_be_forwarded_is_although_a_range_ignores_it() {
    let said =
        parse(r#"{"forwardPorts": [3000], "portsAttributes": {"3000-3010": {"onAutoForward": "ignore"}}}"#);
    assert!(is_exposed(&said, 3000) && !is_exposed(&said, 3001));
}

#[test]
fn the_entries_of_a_label_go_on_top_of_each_other() {
    let said = from_metadata(
        r#"[{"id": "ghcr.io/x/node:1", "customizations": {}},
            {"forwardPorts": [80], "portsAttributes": {"3000": {"label": "a", "onAutoForward": "silent"}},
             "otherPortsAttributes": {"onAutoForward": "ignore"}},
            {"forwardPorts": [81], "portsAttributes": {"3000": {"label": "b"}},
             "otherPortsAttributes": {"label": "rest"}, "customizations": {}}]"#,
        None,
    )
    .unwrap();
    assert!(is_exposed(&said, 80) && is_exposed(&said, 81) && is_exposed(&said, 5000));
    // As a whole: that it is silent was said by the entry that is replaced.
    assert_eq!(note(&said, 3000), (Some("b".to_owned()), false));
    assert_eq!(note(&said, 5000), (Some("rest".to_owned()), false));
    assert_eq!(said.not_used(), ["customizations"]);
    assert_eq!(from_metadata(r#"{"forwardPorts": [80]}"#, None).unwrap(), parse(r#"{"forwardPorts": [80]}"#));
    assert_eq!(from_metadata(" ", None).unwrap(), Devcontainer::default());
}

/// What an image and a folder say, both about 3000 and each about something else.
const METADATA: &str = r#"[{"forwardPorts": [80], "otherPortsAttributes": {"onAutoForward": "ignore"},
    "portsAttributes": {"3000": {"label": "image", "onAutoForward": "ignore"}, "9229": {"label": "debug"}},
    "customizations": {}}]"#;
const FOLDER: &str =
    r#"{"forwardPorts": [81], "portsAttributes": {"3000": {"label": "folder"}}, "runArgs": []}"#;

#[test]
fn a_folder_goes_on_top_of_the_image_port_by_port() {
    let folder = || parse(FOLDER);
    let both = exposure(None, None, from_metadata(METADATA, None).unwrap(), folder());
    let said = from_metadata(METADATA, None).unwrap().merge(folder());
    assert_eq!((&both.policy, &both.notes), (&said.port_forward(), &said.notes()));
    let policy = Policy::from(&both.policy.unwrap());
    for (port, exposed) in [(80, true), (81, true), (3000, true), (9229, true), (5000, false)] {
        let decision = policy.decide(NonZeroU16::new(port).unwrap(), &ControlPorts::default());
        assert_eq!(decision == Decision::Allow, exposed, "{port}");
    }
    assert_eq!(note(&said, 3000), (Some("folder".to_owned()), false));
    assert_eq!(note(&said, 9229), (Some("debug".to_owned()), false));
    assert_eq!(both.not_used, ["customizations", "runArgs"]);
    // What neither says is the default, and one of them alone says it all.
    assert_eq!(exposure(None, None, parse("{}"), parse("{}")), Exposure::default());
    let alone = exposure(None, None, parse("{}"), folder());
    assert_eq!((alone.policy, alone.notes), (folder().port_forward(), folder().notes()));
}

#[test]
fn options_replace_labels_and_labels_replace_image_and_folder_but_no_note() {
    let only = |port: u16| {
        let ports = [NonZeroU16::new(port).unwrap()].into();
        PortForward { allow: Allow::Ports(ports), ..PortForward::default() }
    };
    let exposed = |options, labels| {
        let said = exposure(options, labels, from_metadata(METADATA, None).unwrap(), parse(FOLDER));
        assert_eq!(said.notes, from_metadata(METADATA, None).unwrap().merge(parse(FOLDER)).notes());
        said.policy
    };
    assert_eq!(exposed(Some(only(1)), Some(only(2))), Some(only(1)));
    assert_eq!(exposed(None, Some(only(2))), Some(only(2)));
}

#[test]
fn a_build_takes_the_place_of_an_image() {
    let build = |text: &str| {
        let said = parse(r#"{"image": "x"}"#).merge(parse(text));
        assert_eq!(said.image(), None);
        let build = said.build().unwrap();
        (build.dockerfile.display().to_string(), build.context.display().to_string())
    };
    let own = |dockerfile: &str, context: &str| (dockerfile.to_owned(), context.to_owned());
    assert_eq!(build(r#"{"build": {"dockerfile": "Dockerfile", "context": ".."}}"#), own("Dockerfile", ".."));
    assert_eq!(build(r#"{"dockerFile": "Old", "context": "x"}"#), own("Old", "x"));
    assert_eq!(build(r#"{"build": {"dockerfile": "D"}}"#), own("D", "."));
    assert_eq!(parse(r#"{"build": {"dockerfile": "D", "args": {}}}"#).not_used(), ["build.args"]);
}

#[test]
fn what_does_not_fit_is_named() {
    let wrong = |text: &str| Devcontainer::parse(text).unwrap_err().to_string();
    assert_eq!(wrong("[]"), "it must be an object");
    assert_eq!(wrong("{\n\"a\": x}"), "it is not JSON: unexpected token at line 2 column 6");
    assert_eq!(wrong(r#"{"forwardPorts": 3000}"#), "forwardPorts must be a list of ports");
    assert_eq!(wrong(r#"{"forwardPorts": [70000]}"#), "forwardPorts must be a list of ports from 1 to 65535");
    assert_eq!(wrong(r#"{"portsAttributes": []}"#), "portsAttributes must be an object");
    assert_eq!(wrong(r#"{"portsAttributes": {"1": 2}}"#), "portsAttributes.1 must be an object");
    assert_eq!(
        wrong(r#"{"portsAttributes": {"1": {"label": 2}}}"#),
        "portsAttributes.1.label must be a text"
    );
    assert_eq!(wrong(r#"{"image": 5}"#), "image must be a text that is not empty");
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
    fn any_entries_make_a_policy_and_notes(
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
        let said = parse(&text);
        let sent = serde_json::to_value(said.port_forward()).unwrap();
        let arrived = if sent.is_null() { None } else { Some(PortForward::from_value(&sent).unwrap()) };
        prop_assert_eq!(arrived, said.port_forward());
        let label = said.ports_as_metadata().unwrap().to_string();
        let told = from_metadata(&label, None).unwrap();
        prop_assert_eq!((told.port_forward(), told.notes()), (said.port_forward(), said.notes()));
    }
}
