use super::*;

fn plain() -> Printer {
    Printer { stream: Stream::Stderr, json: false, colour: false }
}

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

fn python() -> ProcessFact {
    ProcessFact { name: "python3".to_owned(), pid: 77 }
}

/// A relayed forward from the host to a python server in `web`.
fn forward() -> Report {
    Report::Forward {
        port: port(5173),
        name: "web".to_owned(),
        process: Some(python()),
        label: None,
        path: ForwardPath::Relay,
    }
}

#[test]
fn a_forward_names_its_target() {
    let report = forward();
    assert_eq!(plain().text(&report), "forward  http://localhost:5173  →  web:5173 (python3, pid 77)");
    let report = Report::Forward {
        port: port(5173),
        name: "web".to_owned(),
        process: None,
        label: None,
        path: ForwardPath::Relay,
    };
    assert_eq!(plain().text(&report), "forward  http://localhost:5173  →  web:5173");
    let label = Some("W\u{1b}eb".to_owned());
    let report = Report::Forward {
        port: port(5173),
        name: "web".to_owned(),
        process: Some(python()),
        label,
        path: ForwardPath::Relay,
    };
    let value = "forward  http://localhost:5173  →  web:5173 \"W\\u{1b}eb\" (python3, pid 77)";
    assert_eq!(plain().text(&report), value);
    assert_eq!(plain().text(&Report::Closed { port: port(5173) }), "closed   http://localhost:5173");
    let path = ForwardPath::Native;
    let report = Report::Forward {
        port: port(5173),
        name: "web".to_owned(),
        process: Some(python()),
        label: None,
        path,
    };
    let said = "forward  http://localhost:5173  →  web:5173 (python3, pid 77), native socket";
    assert_eq!(plain().text(&report), said);
    assert_eq!(to_json(&report)["path"], "native");
}

#[test]
fn a_taken_port_names_its_holder_and_what_to_do() {
    let holder = Holder::Process(python(), "python3 -m http.server".to_owned());
    let text = plain().text(&Report::Taken { port: port(3000), holder });
    let (line, hint) = text.split_once('\n').unwrap();
    assert_eq!(line, "taken    localhost:3000 is held by python3, pid 77 (python3 -m http.server)");
    assert!(hint.starts_with("hint: free it"), "{hint}");
    let text = plain().text(&Report::Taken { port: port(3000), holder: Holder::User("alice".to_owned()) });
    assert!(text.contains("is held by a process of user alice"), "{text}");
}

#[test]
fn a_process_cannot_write_to_the_terminal_by_its_name() {
    let process = ProcessFact { name: "no\u{1b}]0;de\u{7}".to_owned(), pid: 1 };
    let report = Report::Forward {
        port: port(1),
        name: "web".to_owned(),
        process: Some(process.clone()),
        label: None,
        path: ForwardPath::Relay,
    };
    assert!(!plain().text(&report).contains(char::is_control));
    let line = Holder::Process(process, "x\r\n\u{1b}[2J".to_owned());
    let taken = plain().text(&Report::Taken { port: port(1), holder: line });
    assert!(taken.lines().all(|line| !line.contains(char::is_control)), "{taken:?}");
    assert_eq!(taken.lines().count(), 2);
}

#[test]
fn a_denied_privileged_port_has_a_hint_that_allows_it() {
    let report = Report::Denied { port: port(80), reason: DenyReason::Privileged };
    assert_eq!(
        plain().text(&report),
        "denied   port 80 is not forwarded: it is below 1024 and no allow list names it\n\
         hint: to forward it: --allow '80,*'"
    );
}

#[test]
fn json_is_one_object_per_line() {
    let report = forward();
    let text = to_json(&report).to_string();
    assert!(!text.contains('\n'));
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["event"], "forward");
    assert_eq!(value["url"], "http://localhost:5173");
    assert_eq!(value["process"]["pid"], 77);
}

#[test]
fn colour_is_applied_to_the_label_only() {
    let printer = Printer { colour: true, ..plain() };
    let text = printer.text(&Report::Closed { port: port(80) });
    assert_eq!(text, "\u{1b}[90mclosed  \u{1b}[0m http://localhost:80");
}
