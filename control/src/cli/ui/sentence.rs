//! What happened in the daemon, as sentences: a line of its journal becomes a line for people.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::Value;

use super::output::{Colour, Talk};
use crate::model::event::{Event, PortForwardEvent, TailscaleServeEvent};
use crate::model::name::escape;

/// One line of the journal for people: when, a word, and what. What is no line of the journal, such as the last words of
/// a daemon that broke, is told as it is.
pub fn sentence(talk: Talk, line: &str, zone: &TimeZone) -> String {
    let Ok(value) = serde_json::from_str::<Value>(line) else { return escape(line).into_owned() };
    let time = value.get("time").and_then(Value::as_str).and_then(|time| time.parse::<Timestamp>().ok());
    let when =
        time.map(|time| time.to_zoned(zone.clone()).strftime("%F %T ").to_string()).unwrap_or_default();
    let (word, colour, text) = match serde_json::from_value::<Event>(value) {
        Ok(event) => in_words(&event),
        // An event of another release.
        Err(_) => ("note", Colour::Grey, line.to_owned()),
    };
    format!("{when}{}", talk.worded(word, colour, &text))
}

fn in_words(event: &Event) -> (&'static str, Colour, String) {
    use Colour::{Green, Grey, Red, Yellow};
    match event {
        Event::DaemonListening { socket } => ("daemon", Green, format!("listens at {socket}")),
        Event::DaemonHttpListening { host, port } => {
            ("daemon", Green, format!("HTTP listens on {host}, port {port}"))
        }
        Event::DaemonHttpPortFallback { preferred, actual } => {
            ("warning", Yellow, format!("HTTP port {preferred} is in use; it is {actual} now"))
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
            let how = if *build { " with its image built anew" } else { "" };
            ("restart", Green, format!("{container_name} is restarted{how}"))
        }
        Event::RestartCompleted { container_name } => ("restart", Green, format!("{container_name} is back")),
        Event::RestartFailed { container_name, reason } => {
            ("failed", Red, format!("{container_name}: {reason}"))
        }
        Event::PortForwardEvent { event } => port_in_words(event),
        Event::TailscaleServeEvent { event } => serve_in_words(event),
        Event::JobTickStart { container_name, job } => {
            ("job", Green, format!("{job} of {container_name} began"))
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
            ("failed", Yellow, format!("{job} of {container_name}, for now: {reason}"))
        }
        Event::JobTickReauthRequired { container_name, job, reason } => {
            ("warning", Yellow, format!("{job} of {container_name} needs somebody to sign in: {reason}"))
        }
        Event::JobRestartScheduled { container_name, job } => {
            ("job", Green, format!("{job} of {container_name} restarts it"))
        }
        Event::JobRestartFailed { container_name, job, reason } => {
            ("failed", Red, format!("{job} of {container_name} could not restart it: {reason}"))
        }
        Event::EngineAttached { ring, reason, started, .. } => {
            let how = if *started { "started" } else { "taken over" };
            let why = reason.as_ref().map(|reason| format!(", since {reason}")).unwrap_or_default();
            ("engine", Green, format!("{how}, by {ring}{why}"))
        }
        Event::EngineLost { reason } => ("warning", Yellow, format!("the relay engine is lost: {reason}")),
        Event::EngineUpgraded { from, to } => {
            ("engine", Green, format!("{to} takes over from {from}, which finishes its connections"))
        }
        Event::ContainerReached { container_name, attach_method } => {
            ("reached", Green, format!("{container_name}, {attach_method}"))
        }
        Event::ContainerUnreachable { container_name, reason } => {
            ("failed", Yellow, format!("{container_name} is not reached: {reason}"))
        }
        Event::EventsLost { count } => {
            ("note", Yellow, format!("{count} events came faster than they were read and are lost"))
        }
        Event::Notice { text } => ("note", Grey, text.clone()),
    }
}

fn port_in_words(event: &PortForwardEvent) -> (&'static str, Colour, String) {
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

fn serve_in_words(event: &TailscaleServeEvent) -> (&'static str, Colour, String) {
    use TailscaleServeEvent::{
        TailscaleServeClosed, TailscaleServeFailed, TailscaleServeOpened, TailscaleServeSkipped,
    };
    match event {
        TailscaleServeOpened { container_name, port } => {
            ("tailnet", Colour::Green, format!("port {port} of this host, for {container_name}"))
        }
        TailscaleServeClosed { container_name, port } => {
            ("tailnet", Colour::Grey, format!("no longer port {port} of this host, for {container_name}"))
        }
        TailscaleServeSkipped { container_name, port, reason } => {
            ("tailnet", Colour::Yellow, format!("not port {port} of {container_name}: {reason}"))
        }
        TailscaleServeFailed { container_name, port, command, reason } => {
            ("failed", Colour::Red, format!("tailscale {command}, port {port} of {container_name}: {reason}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(line: &str) -> String {
        sentence(Talk::to_stderr(false), line, &TimeZone::UTC)
    }

    #[test]
    fn a_line_of_the_journal_becomes_a_sentence() {
        let line = r#"{"time":"2026-01-02T03:04:05.678Z","kind":"register","containerName":"coder"}"#;
        assert_eq!(told(line), "2026-01-02 03:04:05 register coder");
        let line = r#"{"kind":"port-forward-event","event":{"kind":"port-forward-closed","containerName":"shop",
            "port":3000,"hostPort":3001,"reason":"container-released"}}"#;
        assert_eq!(told(line), "closed   http://localhost:3001  →  shop:3000 (container-released)");
        let line = r#"{"kind":"port-forward-event","event":{"kind":"port-forward-opened","containerName":"shop",
            "port":3000,"hostPort":3000,"bindAddr":"127.0.0.1","label":"W\u001beb"}}"#;
        assert_eq!(told(line), "forward  http://localhost:3000  →  shop:3000 \"W\\u{1b}eb\"");
    }

    #[test]
    fn what_another_release_tells_is_told_as_it_is() {
        let line = r#"{"time":"2026-01-02T03:04:05.678Z","kind":"something-else"}"#;
        assert_eq!(told(line), format!("2026-01-02 03:04:05 note     {line}"));
        assert_eq!(told("thread 'main' panicked\u{1b}[2J"), "thread 'main' panicked\\u{1b}[2J");
    }

    #[test]
    fn a_container_cannot_write_to_the_terminal_by_an_event() {
        let line = r#"{"kind":"restart-failed","containerName":"x\u001b[2J","reason":"a\nb\u202e"}"#;
        assert!(!told(line).contains(char::is_control));
        assert!(!told(line).contains('\u{202e}'));
    }
}
