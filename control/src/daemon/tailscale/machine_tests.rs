use super::*;

const PORT: NonZeroU16 = NonZeroU16::new(3000).unwrap();
const OTHER: NonZeroU16 = NonZeroU16::new(3001).unwrap();

fn ports(ports: &[(NonZeroU16, &str)]) -> Ports {
    ports.iter().map(|(port, name)| (*port, (*name).to_owned())).collect()
}

fn ok() -> Called {
    Called { stdout: br#"{"BackendState":"Running","Peer":{}}"#.to_vec(), ..Called::default() }
}

fn refusal(code: i32, text: &str) -> Called {
    Called { code, stderr: text.as_bytes().to_vec(), ..Called::default() }
}

/// Makes every call that is due; `request_handler` says what comes of it.
fn settle(machine: &mut Machine, request_handler: impl Fn(Call) -> Called) -> (Vec<Call>, Vec<String>) {
    let (mut calls, mut events) = (Vec::new(), Vec::new());
    while let Some(call) = machine.next() {
        assert_eq!(machine.next(), None, "two calls at once");
        calls.push(call);
        assert!(calls.len() < 100, "there is no end: {calls:?}");
        events.extend(machine.ended(&request_handler(call)).map(|event| in_short(&event)));
    }
    (calls, events)
}

fn in_short(event: &TailscaleServeEvent) -> String {
    match event {
        TailscaleServeEvent::TailscaleServeOpened { container_name, port } => {
            format!("opened {container_name} {port}")
        }
        TailscaleServeEvent::TailscaleServeClosed { container_name, port } => {
            format!("closed {container_name} {port}")
        }
        TailscaleServeEvent::TailscaleServeSkipped { container_name, port, reason } => {
            format!("skipped {container_name} {port}: {reason}")
        }
        TailscaleServeEvent::TailscaleServeFailed { container_name, port, command, reason } => {
            format!("failed {command} {container_name} {port}: {reason}")
        }
    }
}

fn serving(name: &str) -> Machine {
    let mut machine = Machine::default();
    machine.wish(&ports(&[(PORT, name)]));
    let (calls, events) = settle(&mut machine, |_| ok());
    assert_eq!(calls, [Call::Status(PORT), Call::Serve(PORT)]);
    assert_eq!(events, [format!("opened {name} 3000")]);
    machine
}

#[test]
fn a_port_is_served_while_it_answers_and_is_forgotten_after() {
    let mut machine = serving("a");
    machine.wish(&ports(&[(PORT, "a")]));
    assert_eq!(machine.next(), None);
    assert_eq!(machine.record(), ports(&[(PORT, "a")]));
    machine.wish(&Ports::new());
    let (calls, events) = settle(&mut machine, |_| ok());
    assert_eq!((calls, events), (vec![Call::Off(PORT)], vec!["closed a 3000".to_owned()]));
    assert_eq!(machine, Machine { last: Some(PORT), ..Machine::default() });
}

#[test]
fn a_tailscale_that_does_not_run_is_not_asked_to_serve() {
    let cases = [
        (
            Called { stdout: br#"{"BackendState":"Stopped"}"#.to_vec(), ..ok() },
            "tailscale backend is Stopped",
        ),
        (Called { stdout: b"{}".to_vec(), ..ok() }, "tailscale backend is unknown"),
        (refusal(1, "not logged in\n"), "not logged in"),
        (refusal(1, ""), "exit status 1"),
        (refusal(124, "timed out after 50ms"), "timed out after 50ms"),
    ];
    for (answer, reason) in cases {
        let mut machine = Machine::default();
        machine.wish(&ports(&[(PORT, "a")]));
        let (calls, events) = settle(&mut machine, |_| answer.clone());
        assert_eq!((calls, events), (vec![Call::Status(PORT)], vec![format!("skipped a 3000: {reason}")]));
        // Not again before it has closed and opened, and then there is nothing to turn off.
        machine.wish(&ports(&[(PORT, "a")]));
        assert_eq!(machine.next(), None);
        machine.wish(&Ports::new());
        assert_eq!(machine.next(), None);
        machine.wish(&ports(&[(PORT, "a")]));
        assert_eq!(machine.next(), Some(Call::Status(PORT)));
    }
}

#[test]
fn a_status_that_is_no_json_is_told_as_such() {
    for text in ["not json", "", "7", "{\"BackendState\":7}"] {
        let called = Called { stdout: text.as_bytes().to_vec(), ..Called::default() };
        assert!(running(&called).unwrap_err().starts_with("invalid tailscale status JSON: "), "{text}");
    }
}

#[test]
fn what_could_not_be_served_is_not_turned_off() {
    for (code, event) in [(1, "failed serve a 3000: no"), (NOT_FOUND, "skipped a 3000: no")] {
        let mut machine = Machine::default();
        machine.wish(&ports(&[(PORT, "a")]));
        let request_handler = |call| if matches!(call, Call::Serve(_)) { refusal(code, "no") } else { ok() };
        let (_, events) = settle(&mut machine, request_handler);
        assert_eq!(events, [event]);
        assert_eq!(machine.record(), Ports::new());
        machine.wish(&Ports::new());
        machine.stop();
        assert_eq!(machine.next(), None);
    }
}

#[test]
fn what_could_not_be_turned_off_stays_owned_and_is_tried_again_at_the_end() {
    let mut machine = serving("a");
    machine.wish(&Ports::new());
    let (calls, events) = settle(&mut machine, |_| refusal(1, "no"));
    assert_eq!((calls, events), (vec![Call::Off(PORT)], vec!["failed off a 3000: no".to_owned()]));
    assert_eq!(machine.record(), ports(&[(PORT, "a")]));
    machine.wish(&Ports::new());
    assert_eq!(machine.next(), None, "once is enough");
    machine.stop();
    let (calls, events) = settle(&mut machine, |_| ok());
    assert_eq!((calls, events), (vec![Call::Off(PORT)], vec!["closed a 3000".to_owned()]));
    assert_eq!(machine.record(), Ports::new());
}

#[test]
fn a_port_that_passes_to_another_container_is_turned_off_first() {
    let mut machine = serving("a");
    machine.wish(&ports(&[(PORT, "b")]));
    let (calls, events) = settle(&mut machine, |_| ok());
    assert_eq!(calls, [Call::Off(PORT), Call::Status(PORT), Call::Serve(PORT)]);
    assert_eq!(events, ["closed a 3000", "opened b 3000"]);
}

#[test]
fn a_port_that_closes_while_it_is_being_served_is_turned_off_then() {
    let mut machine = Machine::default();
    machine.wish(&ports(&[(PORT, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(PORT)));
    assert_eq!(machine.ended(&ok()), None);
    assert_eq!(machine.next(), Some(Call::Serve(PORT)));
    assert_eq!(machine.record(), ports(&[(PORT, "a")]), "it may be served by now");
    machine.wish(&Ports::new());
    assert_eq!(machine.next(), None, "two calls at once");
    let (calls, _) = {
        assert_eq!(in_short(&machine.ended(&ok()).unwrap()), "opened a 3000");
        settle(&mut machine, |_| ok())
    };
    assert_eq!(calls, [Call::Off(PORT)]);
}

#[test]
fn a_port_that_closes_while_tailscale_is_asked_for_its_status_is_not_served() {
    let mut machine = Machine::default();
    machine.wish(&ports(&[(PORT, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(PORT)));
    machine.wish(&Ports::new());
    assert_eq!(machine.ended(&ok()), None);
    assert_eq!(machine.next(), None);
}

#[test]
fn a_port_that_only_flickers_is_left_served() {
    let mut machine = serving("a");
    machine.wish(&ports(&[(PORT, "a"), (OTHER, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(OTHER)));
    machine.wish(&ports(&[(OTHER, "a")]));
    machine.wish(&ports(&[(PORT, "a"), (OTHER, "a")]));
    machine.ended(&ok());
    assert_eq!(settle(&mut machine, |_| ok()).0, [Call::Serve(OTHER)]);
}

#[test]
fn what_an_earlier_daemon_served_is_served_again_or_turned_off() {
    let mut machine = Machine::new(ports(&[(PORT, "a"), (OTHER, "a")]));
    machine.wish(&ports(&[(PORT, "a")]));
    let (calls, events) = settle(&mut machine, |_| ok());
    assert_eq!(calls, [Call::Status(PORT), Call::Serve(PORT), Call::Off(OTHER)]);
    assert_eq!(events, ["opened a 3000", "closed a 3001"]);
    machine.wish(&ports(&[(PORT, "a")]));
    assert_eq!(machine.next(), None);
}

#[test]
fn a_stop_turns_off_all_that_is_owned_and_hears_no_more_wishes() {
    let mut machine = Machine::default();
    machine.wish(&ports(&[(PORT, "a"), (OTHER, "b")]));
    settle(&mut machine, |_| ok());
    machine.stop();
    machine.wish(&ports(&[(PORT, "a")]));
    let (calls, _) = settle(&mut machine, |_| ok());
    assert_eq!(calls, [Call::Off(PORT), Call::Off(OTHER)]);
    assert_eq!(machine.record(), Ports::new());
}

#[test]
fn a_serve_that_was_on_its_way_at_the_stop_is_turned_off() {
    let mut machine = Machine::default();
    machine.wish(&ports(&[(PORT, "a")]));
    machine.next();
    machine.ended(&ok());
    assert_eq!(machine.next(), Some(Call::Serve(PORT)));
    machine.stop();
    machine.ended(&ok());
    assert_eq!(settle(&mut machine, |_| ok()).0, [Call::Off(PORT)]);
}

#[test]
fn a_port_that_flaps_does_not_keep_another_one_waiting() {
    let mut machine = Machine::default();
    machine.wish(&ports(&[(PORT, "a"), (OTHER, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(PORT)));
    machine.ended(&refusal(1, "no"));
    machine.wish(&ports(&[(OTHER, "a")]));
    machine.wish(&ports(&[(PORT, "a"), (OTHER, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(OTHER)));
}

#[test]
fn the_calls_are_those_of_the_wire() {
    assert_eq!(Call::Status(PORT).words(), ["status", "--json"]);
    assert_eq!(Call::Serve(PORT).words(), ["serve", "--bg", "--tcp=3000", "3000"]);
    assert_eq!(Call::Off(PORT).words(), ["serve", "--tcp=3000", "off"]);
}

#[test]
fn a_reason_is_short_and_cannot_write_to_a_terminal() {
    let reason = why(&refusal(1, &format!("\u{1b}[2J{}", "x".repeat(10_000))));
    assert!(reason.chars().count() < 400 && !reason.contains('\u{1b}'), "{reason}");
}
