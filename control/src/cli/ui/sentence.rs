//! Sentences for the daemon's events: converts a line of its journal to a line for people.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::Value;

use super::output::{Colour, Printer};
use crate::model::event::{Event, PortForwardEvent, TailscaleServeEvent};
use crate::model::name::escape;

/// Formats one line of the journal: time, label and sentence. A line that is not JSON, such as the panic message of a
/// daemon, is returned escaped.
pub fn sentence(printer: Printer, line: &str, zone: &TimeZone) -> String {
    let Ok(value) = serde_json::from_str::<Value>(line) else { return escape(line).into_owned() };
    let time = value.get("time").and_then(Value::as_str).and_then(|time| time.parse::<Timestamp>().ok());
    let when = time
        .map(|time| time.to_zoned_datetime(zone.clone()).strftime("%F %T ").to_string())
        .unwrap_or_default();
    let (word, colour, text) = match serde_json::from_value::<Event>(value) {
        Ok(event) => describe(&event),
        // An event kind that this build does not have.
        Err(_) => ("note", Colour::Grey, line.to_owned()),
    };
    format!("{when}{}", printer.labelled(word, colour, &text))
}

fn describe(event: &Event) -> (&'static str, Colour, String) {
    use Colour::{Green, Grey, Red, Yellow};
    match event {
        Event::DaemonListening { socket } => ("daemon", Green, format!("listens at {socket}")),
        Event::DaemonHttpListening { host, port } => {
            ("daemon", Green, format!("HTTP listens on {host}, port {port}"))
        }
        Event::DaemonHttpPortFallback { preferred, actual } => {
            ("warning", Yellow, format!("HTTP port {preferred} is in use; using {actual} instead"))
        }
        Event::DaemonStopping => ("daemon", Grey, "is stopping".to_owned()),
        Event::ShutdownRequested => ("daemon", Grey, "was asked to stop".to_owned()),
        Event::Register { container_name } => ("register", Green, container_name.clone()),
        Event::Deregister { container_name, reason } => {
            let why = if reason == "requested" { "as requested" } else { reason };
            ("removed", Grey, format!("{container_name}, {why}"))
        }
        Event::RegistrationSkipped { container_name, reason } => {
            ("skipped", Yellow, format!("{container_name}: {reason}"))
        }
        Event::Grant { container_name, what } => {
            ("grant", Green, format!("{container_name}: {}", what.join(", ")))
        }
        Event::Revoke { container_name, what } => {
            ("revoke", Grey, format!("{container_name}: {}", what.join(", ")))
        }
        Event::RestartScheduled { container_name, build } => {
            let how = if *build { " with a newly built image" } else { "" };
            ("restart", Green, format!("{container_name} is being restarted{how}"))
        }
        Event::RestartCompleted { container_name } => {
            ("restart", Green, format!("{container_name} is running again"))
        }
        Event::RestartFailed { container_name, reason } => {
            ("failed", Red, format!("{container_name}: {reason}"))
        }
        Event::PortForwardEvent { event } => describe_port_event(event),
        Event::TailscaleServeEvent { event } => describe_serve_event(event),
        Event::JobTickStart { container_name, job } => {
            ("job", Green, format!("{job} of {container_name} started"))
        }
        Event::JobTickSkipped { container_name, job, reason } => {
            ("job", Grey, format!("{job} of {container_name} was skipped: {reason}"))
        }
        Event::JobTickOk { container_name, job } => {
            ("job", Green, format!("{job} of {container_name} succeeded"))
        }
        Event::JobTickError { container_name, job, error } => {
            ("failed", Red, format!("{job} of {container_name}: {error}"))
        }
        Event::JobTickTransientFailure { container_name, job, reason } => {
            ("failed", Yellow, format!("{job} of {container_name}, temporarily: {reason}"))
        }
        Event::JobTickReauthRequired { container_name, job, reason } => {
            ("warning", Yellow, format!("{job} of {container_name} needs a new sign-in: {reason}"))
        }
        Event::JobRestartScheduled { container_name, job } => {
            ("job", Green, format!("{job} restarts {container_name}"))
        }
        Event::JobRestartFailed { container_name, job, reason } => {
            ("failed", Red, format!("{job} could not restart {container_name}: {reason}"))
        }
        Event::EngineAttached { ring, reason, started, .. } => {
            let how = if *started { "started" } else { "attached" };
            let why = reason.as_ref().map(|reason| format!(", since {reason}")).unwrap_or_default();
            ("engine", Green, format!("{how}, with {ring}{why}"))
        }
        Event::EngineLost { reason } => ("warning", Yellow, format!("the relay engine is lost: {reason}")),
        Event::EngineUpgraded { from, to } => {
            ("engine", Green, format!("{to} takes over from {from}, which finishes its connections"))
        }
        Event::ContainerReached { container_name, attach_method } => {
            ("reached", Green, format!("{container_name}, {attach_method}"))
        }
        Event::ContainerUnreachable { container_name, reason } => {
            ("failed", Yellow, format!("{container_name} is unreachable: {reason}"))
        }
        Event::EventsLost { count } => (
            "note",
            Yellow,
            format!("{count} events were lost, since they arrived faster than they were read"),
        ),
        Event::Notice { text } => ("note", Grey, text.clone()),
    }
}

fn describe_port_event(event: &PortForwardEvent) -> (&'static str, Colour, String) {
    match event {
        PortForwardEvent::PortForwardOpened {
            container_name, port, host_port, label, silent, path, ..
        } => {
            let label = label.as_ref().map(|label| format!(" \"{label}\"")).unwrap_or_default();
            let colour = if *silent { Colour::Grey } else { Colour::Green };
            let path = if path.is_relay() { "" } else { ", native socket" };
            (
                "forward",
                colour,
                format!("http://localhost:{host_port}  →  {container_name}:{port}{label}{path}"),
            )
        }
        PortForwardEvent::PortForwardClosed { container_name, port, host_port, reason } => {
            let text = format!("http://localhost:{host_port}  →  {container_name}:{port} ({reason})");
            ("closed", Colour::Grey, text)
        }
        PortForwardEvent::PortForwardFailed { container_name, port, reason } => {
            ("failed", Colour::Red, format!("{container_name}:{port} is not forwarded: {reason}"))
        }
    }
}

fn describe_serve_event(event: &TailscaleServeEvent) -> (&'static str, Colour, String) {
    use TailscaleServeEvent::{
        TailscaleServeClosed, TailscaleServeFailed, TailscaleServeOpened, TailscaleServeSkipped,
    };
    match event {
        TailscaleServeOpened { container_name, port } => {
            ("tailnet", Colour::Green, format!("port {port} of this host, for {container_name}"))
        }
        TailscaleServeClosed { container_name, port } => (
            "tailnet",
            Colour::Grey,
            format!("port {port} of this host is no longer served, for {container_name}"),
        ),
        TailscaleServeSkipped { container_name, port, reason } => {
            ("tailnet", Colour::Yellow, format!("port {port} of {container_name} is not served: {reason}"))
        }
        TailscaleServeFailed { container_name, port, command, reason } => {
            ("failed", Colour::Red, format!("tailscale {command}, port {port} of {container_name}: {reason}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(line: &str) -> String {
        sentence(Printer::to_stderr(false), line, &TimeZone::UTC)
    }

    #[test]
    fn a_journal_line_is_formatted_as_a_sentence() {
        let line = r#"{"time":"2026-01-02T03:04:05.678Z","kind":"register","containerName":"coder"}"#;
        assert_eq!(value(line), "2026-01-02 03:04:05 register coder");
        let line = r#"{"kind":"port-forward-event","event":{"kind":"port-forward-closed","containerName":"shop",
            "port":3000,"hostPort":3001,"reason":"container-released"}}"#;
        assert_eq!(value(line), "closed   http://localhost:3001  →  shop:3000 (container-released)");
        let line = r#"{"kind":"port-forward-event","event":{"kind":"port-forward-opened","containerName":"shop",
            "port":3000,"hostPort":3000,"bindAddr":"127.0.0.1","label":"W\u001beb"}}"#;
        assert_eq!(value(line), "forward  http://localhost:3000  →  shop:3000 \"W\\u{1b}eb\"");
    }

    #[test]
    fn an_unknown_event_is_printed_unchanged() {
        let line = r#"{"time":"2026-01-02T03:04:05.678Z","kind":"something-else"}"#;
        assert_eq!(value(line), format!("2026-01-02 03:04:05 note     {line}"));
        assert_eq!(value("thread 'main' panicked\u{1b}[2J"), "thread 'main' panicked\\u{1b}[2J");
    }

    #[test]
    fn a_container_cannot_write_to_the_terminal_by_an_event() {
        let line = r#"{"kind":"restart-failed","containerName":"x\u001b[2J","reason":"a\nb\u202e"}"#;
        assert!(!value(line).contains(char::is_control));
        assert!(!value(line).contains('\u{202e}'));
    }
}
