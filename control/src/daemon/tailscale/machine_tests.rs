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

/// Makes all calls that are due, with the results of `result_of`.
fn make_calls(machine: &mut Machine, result_of: impl Fn(Call) -> Called) -> (Vec<Call>, Vec<String>) {
    let (mut calls, mut events) = (Vec::new(), Vec::new());
    while let Some(call) = machine.next() {
        assert_eq!(machine.next(), None, "two calls at once");
        calls.push(call);
        assert!(calls.len() < 100, "the calls do not end: {calls:?}");
        events.extend(machine.ended(&result_of(call)).map(|event| summary(&event)));
    }
    (calls, events)
}

fn summary(event: &TailscaleServeEvent) -> String {
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
    machine.set_wanted(&ports(&[(PORT, name)]));
    let (calls, events) = make_calls(&mut machine, |_| ok());
    assert_eq!(calls, [Call::Status(PORT), Call::Serve(PORT)]);
    assert_eq!(events, [format!("opened {name} 3000")]);
    machine
}

#[test]
fn a_port_is_served_while_it_answers_and_then_turned_off() {
    let mut machine = serving("a");
    machine.set_wanted(&ports(&[(PORT, "a")]));
    assert_eq!(machine.next(), None);
    assert_eq!(machine.record(), ports(&[(PORT, "a")]));
    machine.set_wanted(&Ports::new());
    let (calls, events) = make_calls(&mut machine, |_| ok());
    assert_eq!((calls, events), (vec![Call::Off(PORT)], vec!["closed a 3000".to_owned()]));
    assert_eq!(machine, Machine { last: Some(PORT), ..Machine::default() });
}

#[test]
fn a_stopped_tailscale_is_not_asked_to_serve() {
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
        machine.set_wanted(&ports(&[(PORT, "a")]));
        let (calls, events) = make_calls(&mut machine, |_| answer.clone());
        assert_eq!((calls, events), (vec![Call::Status(PORT)], vec![format!("skipped a 3000: {reason}")]));
        // The port has to close and open before a second attempt, and it was not served, so it is not turned off.
        machine.set_wanted(&ports(&[(PORT, "a")]));
        assert_eq!(machine.next(), None);
        machine.set_wanted(&Ports::new());
        assert_eq!(machine.next(), None);
        machine.set_wanted(&ports(&[(PORT, "a")]));
        assert_eq!(machine.next(), Some(Call::Status(PORT)));
    }
}

#[test]
fn an_invalid_status_is_reported_as_invalid_json() {
    for text in ["not json", "", "7", "{\"BackendState\":7}"] {
        let called = Called { stdout: text.as_bytes().to_vec(), ..Called::default() };
        assert!(check_running(&called).unwrap_err().starts_with("invalid tailscale status JSON: "), "{text}");
    }
}

#[test]
fn a_port_that_could_not_be_served_is_not_turned_off() {
    for (code, event) in [(1, "failed serve a 3000: no"), (NOT_FOUND, "skipped a 3000: no")] {
        let mut machine = Machine::default();
        machine.set_wanted(&ports(&[(PORT, "a")]));
        let result_of = |call| if matches!(call, Call::Serve(_)) { refusal(code, "no") } else { ok() };
        let (_, events) = make_calls(&mut machine, result_of);
        assert_eq!(events, [event]);
        assert_eq!(machine.record(), Ports::new());
        machine.set_wanted(&Ports::new());
        machine.stop();
        assert_eq!(machine.next(), None);
    }
}

#[test]
fn a_port_that_could_not_be_turned_off_stays_owned_and_is_retried_at_the_stop() {
    let mut machine = serving("a");
    machine.set_wanted(&Ports::new());
    let (calls, events) = make_calls(&mut machine, |_| refusal(1, "no"));
    assert_eq!((calls, events), (vec![Call::Off(PORT)], vec!["failed off a 3000: no".to_owned()]));
    assert_eq!(machine.record(), ports(&[(PORT, "a")]));
    machine.set_wanted(&Ports::new());
    assert_eq!(machine.next(), None, "only one attempt");
    machine.stop();
    let (calls, events) = make_calls(&mut machine, |_| ok());
    assert_eq!((calls, events), (vec![Call::Off(PORT)], vec!["closed a 3000".to_owned()]));
    assert_eq!(machine.record(), Ports::new());
}

#[test]
fn a_port_that_passes_to_another_container_is_turned_off_first() {
    let mut machine = serving("a");
    machine.set_wanted(&ports(&[(PORT, "b")]));
    let (calls, events) = make_calls(&mut machine, |_| ok());
    assert_eq!(calls, [Call::Off(PORT), Call::Status(PORT), Call::Serve(PORT)]);
    assert_eq!(events, ["closed a 3000", "opened b 3000"]);
}

#[test]
fn a_port_that_closes_during_serve_is_turned_off_afterwards() {
    let mut machine = Machine::default();
    machine.set_wanted(&ports(&[(PORT, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(PORT)));
    assert_eq!(machine.ended(&ok()), None);
    assert_eq!(machine.next(), Some(Call::Serve(PORT)));
    assert_eq!(machine.record(), ports(&[(PORT, "a")]), "it may already be served");
    machine.set_wanted(&Ports::new());
    assert_eq!(machine.next(), None, "two calls at once");
    let (calls, _) = {
        assert_eq!(summary(&machine.ended(&ok()).unwrap()), "opened a 3000");
        make_calls(&mut machine, |_| ok())
    };
    assert_eq!(calls, [Call::Off(PORT)]);
}

#[test]
fn a_port_that_closes_during_status_is_not_served() {
    let mut machine = Machine::default();
    machine.set_wanted(&ports(&[(PORT, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(PORT)));
    machine.set_wanted(&Ports::new());
    assert_eq!(machine.ended(&ok()), None);
    assert_eq!(machine.next(), None);
}

#[test]
fn a_port_that_flickers_stays_served() {
    let mut machine = serving("a");
    machine.set_wanted(&ports(&[(PORT, "a"), (OTHER, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(OTHER)));
    machine.set_wanted(&ports(&[(OTHER, "a")]));
    machine.set_wanted(&ports(&[(PORT, "a"), (OTHER, "a")]));
    machine.ended(&ok());
    assert_eq!(make_calls(&mut machine, |_| ok()).0, [Call::Serve(OTHER)]);
}

#[test]
fn ports_of_an_earlier_daemon_are_served_again_or_turned_off() {
    let mut machine = Machine::new(ports(&[(PORT, "a"), (OTHER, "a")]));
    machine.set_wanted(&ports(&[(PORT, "a")]));
    let (calls, events) = make_calls(&mut machine, |_| ok());
    assert_eq!(calls, [Call::Status(PORT), Call::Serve(PORT), Call::Off(OTHER)]);
    assert_eq!(events, ["opened a 3000", "closed a 3001"]);
    machine.set_wanted(&ports(&[(PORT, "a")]));
    assert_eq!(machine.next(), None);
}

#[test]
fn a_stop_turns_off_all_owned_ports_and_ignores_later_changes() {
    let mut machine = Machine::default();
    machine.set_wanted(&ports(&[(PORT, "a"), (OTHER, "b")]));
    make_calls(&mut machine, |_| ok());
    machine.stop();
    machine.set_wanted(&ports(&[(PORT, "a")]));
    let (calls, _) = make_calls(&mut machine, |_| ok());
    assert_eq!(calls, [Call::Off(PORT), Call::Off(OTHER)]);
    assert_eq!(machine.record(), Ports::new());
}

#[test]
fn a_serve_call_that_runs_at_the_stop_is_turned_off() {
    let mut machine = Machine::default();
    machine.set_wanted(&ports(&[(PORT, "a")]));
    machine.next();
    machine.ended(&ok());
    assert_eq!(machine.next(), Some(Call::Serve(PORT)));
    machine.stop();
    machine.ended(&ok());
    assert_eq!(make_calls(&mut machine, |_| ok()).0, [Call::Off(PORT)]);
}

#[test]
fn a_port_that_flaps_does_not_delay_another() {
    let mut machine = Machine::default();
    machine.set_wanted(&ports(&[(PORT, "a"), (OTHER, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(PORT)));
    machine.ended(&refusal(1, "no"));
    machine.set_wanted(&ports(&[(OTHER, "a")]));
    machine.set_wanted(&ports(&[(PORT, "a"), (OTHER, "a")]));
    assert_eq!(machine.next(), Some(Call::Status(OTHER)));
}

#[test]
fn the_arguments_are_those_of_the_wire_specification() {
    assert_eq!(Call::Status(PORT).words(), ["status", "--json"]);
    assert_eq!(Call::Serve(PORT).words(), ["serve", "--bg", "--tcp=3000", "3000"]);
    assert_eq!(Call::Off(PORT).words(), ["serve", "--tcp=3000", "off"]);
}

#[test]
fn a_reason_is_bounded_and_escaped() {
    let reason = reason_of(&refusal(1, &format!("\u{1b}[2J{}", "x".repeat(10_000))));
    assert!(reason.chars().count() < 400 && !reason.contains('\u{1b}'), "{reason}");
}
