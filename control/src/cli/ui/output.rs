//! Prints reports and errors. No other file prints.
//!
//! A line starts with a label of eight columns; colour only repeats the meaning of the label. Text from a container
//! (process names, command lines) is escaped here, immediately before it is printed, so that no other file has to
//! escape it. Under `--json` every line is one object with an `event`.

use std::io::{self, IsTerminal, Write};
use std::num::NonZeroU16;

use serde_json::{Value, json};

use crate::cli::exit::Failure;
use crate::model::forward_table::ForwardPath;
use crate::model::name::escape;
use crate::model::port_policy::DenyReason;
use crate::sys::processes::{Holder, ProcessFact};

/// An event of a foreground forwarding session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A port is forwarded.
    Forward {
        /// The port, the same number on the host and inside.
        port: NonZeroU16,
        /// The name of the namespace.
        name: String,
        /// The process that listens, if it could be determined.
        process: Option<ProcessFact>,
        /// The purpose of the port, if the registration or the folder states one.
        label: Option<String>,
        /// The path of its connections: relay or native socket.
        path: ForwardPath,
    },
    /// A forwarded port is closed.
    Closed {
        /// The port on the host.
        port: NonZeroU16,
    },
    /// Another program listens on the port of the host.
    Taken {
        /// The port on the host.
        port: NonZeroU16,
        /// That program.
        holder: Holder,
    },
    /// The port policy denies a port.
    Denied {
        /// The port inside.
        port: NonZeroU16,
        /// The reason.
        reason: DenyReason,
    },
    /// A rule of the daemon denies a port.
    Withheld {
        /// The port inside.
        port: NonZeroU16,
        /// The reason.
        reason: String,
    },
    /// Listening on the host port failed for another reason.
    Failed {
        /// The port on the host.
        port: NonZeroU16,
        /// The error of the kernel.
        detail: String,
    },
    /// Information.
    Note {
        /// The sentence.
        text: String,
        /// The suggested action.
        hint: Option<String>,
    },
    /// A problem that does not end the verb.
    Warning {
        /// The sentence.
        text: String,
        /// The suggested action.
        hint: Option<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

/// Prints to one stream, as text or as JSON.
#[derive(Clone, Copy, Debug)]
pub struct Printer {
    stream: Stream,
    json: bool,
    colour: bool,
}

impl Printer {
    /// Returns a printer for standard output.
    pub fn to_stdout(json: bool) -> Printer {
        Printer { stream: Stream::Stdout, json, colour: colour(&io::stdout()) }
    }

    /// Returns a printer for standard error.
    pub fn to_stderr(json: bool) -> Printer {
        Printer { stream: Stream::Stderr, json, colour: colour(&io::stderr()) }
    }

    /// Prints one report.
    pub fn report(&self, report: &Report) {
        if self.json { self.print(&to_json(report).to_string()) } else { self.print(&self.text(report)) }
    }

    /// Prints the failure that ends a verb.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            let hint = failure.hint.as_deref();
            let line = json!({ "event": "error", "error": failure.message, "hint": hint, "exit": failure.exit.code() });
            self.print(&line.to_string());
        } else {
            let error = self.paint("error:", Colour::Red);
            self.print(&with_hint(format!("{error} {}", escape(&failure.message)), failure.hint.as_deref()));
        }
    }

    /// Prints a text after a label.
    pub fn line(&self, word: &str, colour: Colour, text: &str) {
        self.print(&self.labelled(word, colour, text));
    }

    /// Formats a text after a label that is padded to eight columns.
    pub fn labelled(&self, word: &str, colour: Colour, text: &str) -> String {
        format!("{} {}", self.paint(&format!("{word:8}"), colour), escape(text))
    }

    /// Prints the text unchanged, as one line. A failed write is ignored: the terminal is closed, and the command continues.
    pub fn print(&self, text: &str) {
        let _ = self.try_print(text);
    }

    /// Prints the text unchanged, as one line, and returns whether the stream still accepts output.
    ///
    /// # Errors
    /// The write failed, such as with EPIPE after the reader has closed the pipe.
    pub fn try_print(&self, text: &str) -> io::Result<()> {
        let line = format!("{text}\n");
        match self.stream {
            Stream::Stdout => io::stdout().write_all(line.as_bytes()).and_then(|()| io::stdout().flush()),
            Stream::Stderr => io::stderr().write_all(line.as_bytes()),
        }
    }

    /// Returns whether [`Printer::ask`] can reach a person: standard input and standard error are terminals.
    pub fn can_ask() -> bool {
        io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// Asks a question on standard error and reads one line. Only `y` and `yes` count as consent; any other line, and
    /// the end of the input, count as refusal.
    pub fn ask(&self, question: &str) -> bool {
        let mut error = io::stderr();
        let mut answer = String::new();
        let asked = error.write_all(question.as_bytes()).and_then(|()| error.flush());
        let read = asked.and_then(|()| io::stdin().read_line(&mut answer));
        read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
    }

    /// Colours a text, if colours are enabled.
    pub fn paint(&self, word: &str, colour: Colour) -> String {
        if self.colour { format!("\u{1b}[{}m{word}\u{1b}[0m", colour as u8) } else { word.to_owned() }
    }

    fn text(&self, report: &Report) -> String {
        match report {
            Report::Forward { port, name, process, label, path } => {
                let label = label.as_ref().map(|label| format!(" \"{}\"", escape(label))).unwrap_or_default();
                let who = process
                    .as_ref()
                    .map(|process| format!(" ({})", describe_process(process)))
                    .unwrap_or_default();
                let word = self.paint("forward ", Colour::Green);
                let path = if path.is_relay() { "" } else { ", native socket" };
                format!("{word} http://localhost:{port}  →  {}:{port}{label}{who}{path}", escape(name))
            }
            Report::Closed { port } => {
                format!("{} http://localhost:{port}", self.paint("closed  ", Colour::Grey))
            }
            Report::Taken { port, holder } => {
                let word = self.paint("taken   ", Colour::Yellow);
                with_hint(
                    format!("{word} localhost:{port} is held by {}", describe_holder(holder)),
                    Some(&taken_hint(holder)),
                )
            }
            Report::Denied { port, reason } => {
                let word = self.paint("denied  ", Colour::Yellow);
                let hint =
                    (*reason == DenyReason::Privileged).then(|| format!("to forward it: --allow '{port},*'"));
                with_hint(format!("{word} port {port} is not forwarded: {reason}"), hint.as_deref())
            }
            Report::Withheld { port, reason } => {
                let word = self.paint("denied  ", Colour::Yellow);
                format!("{word} port {port} is not forwarded: {}", escape(reason))
            }
            Report::Failed { port, detail } => {
                format!(
                    "{} localhost:{port} cannot be opened for listening: {}",
                    self.paint("failed  ", Colour::Red),
                    escape(detail)
                )
            }
            Report::Note { text, hint } => with_hint(
                format!("{} {}", self.paint("note    ", Colour::Grey), escape(text)),
                hint.as_deref(),
            ),
            Report::Warning { text, hint } => with_hint(
                format!("{} {}", self.paint("warning ", Colour::Yellow), escape(text)),
                hint.as_deref(),
            ),
        }
    }
}

/// The colours in use, with their numbers from ECMA-48.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Colour {
    /// An error.
    Red = 31,
    /// Success.
    Green = 32,
    /// A problem that needs attention.
    Yellow = 33,
    /// Secondary information.
    Grey = 90,
}

/// Returns whether to use colours: only on a terminal that supports them, and not if `NO_COLOR` is set
/// (<https://no-color.org>).
fn colour(stream: &impl IsTerminal) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
}

fn with_hint(line: String, hint: Option<&str>) -> String {
    match hint {
        Some(hint) => format!("{line}\nhint: {}", escape(hint)),
        None => line,
    }
}

fn describe_process(process: &ProcessFact) -> String {
    format!("{}, pid {}", escape(&process.name), process.pid)
}

fn describe_holder(holder: &Holder) -> String {
    match holder {
        Holder::Process(process, line) if line.is_empty() => describe_process(process),
        Holder::Process(process, line) => {
            let short: String = line.chars().take(60).collect();
            let dots = if short.len() < line.len() { "…" } else { "" };
            format!("{} ({}{dots})", describe_process(process), escape(&short))
        }
        Holder::User(user) => format!("a process of user {}", escape(user)),
        Holder::Unknown => "a process that this user cannot inspect".to_owned(),
    }
}

fn taken_hint(holder: &Holder) -> String {
    match holder {
        Holder::Process(process, _) if process.name == "landfall" => {
            "another landfall forwards that port; give one of the two servers another port".to_owned()
        }
        _ => "free it, or give the server inside another port; it is forwarded as soon as it is free"
            .to_owned(),
    }
}

fn to_json(report: &Report) -> Value {
    match report {
        Report::Forward { port, name, process, label, path } => {
            let mut value = json!({
                "event": "forward", "port": port, "url": format!("http://localhost:{port}"), "name": name,
                "path": path,
                "process": process.as_ref().map(|process| json!({ "name": process.name, "pid": process.pid })),
            });
            if let Some(label) = label {
                value["label"] = label.as_str().into();
            }
            value
        }
        Report::Closed { port } => json!({ "event": "closed", "port": port }),
        Report::Taken { port, holder } => {
            let holder_json = match holder {
                Holder::Process(process, line) => {
                    json!({ "name": process.name, "pid": process.pid, "command": line })
                }
                Holder::User(user) => json!({ "user": user }),
                Holder::Unknown => Value::Null,
            };
            json!({ "event": "taken", "port": port, "holder": holder_json, "hint": taken_hint(holder) })
        }
        Report::Denied { port, reason } => {
            json!({ "event": "denied", "port": port, "reason": reason.to_string() })
        }
        Report::Withheld { port, reason } => json!({ "event": "denied", "port": port, "reason": reason }),
        Report::Failed { port, detail } => json!({ "event": "failed", "port": port, "detail": detail }),
        Report::Note { text, hint } => json!({ "event": "note", "text": text, "hint": hint }),
        Report::Warning { text, hint } => json!({ "event": "warning", "text": text, "hint": hint }),
    }
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
