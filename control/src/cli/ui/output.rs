//! What people read. The only file that prints.
//!
//! A line begins with one word of eight columns, so that the eye finds its way; colour only repeats what the word
//! says. Everything that a process inside chose (its name, its command line) is escaped here, at the last moment,
//! so that no other file has to remember it. Under `--json` every line is one object with an `event`.

use std::io::{self, IsTerminal, Write};
use std::num::NonZeroU16;

use serde_json::{Value, json};

use crate::cli::exit::Failure;
use crate::model::forward_table::ForwardPath;
use crate::model::name::escape;
use crate::model::port_policy::DenyReason;
use crate::sys::processes::{Holder, ProcessFact};

/// Something worth telling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A port answers on the host.
    Forward {
        /// The port on the host, and the one inside.
        port: NonZeroU16,
        /// What people call the namespace.
        name: String,
        /// Who listens, where that could be found out.
        process: Option<ProcessFact>,
        /// What it is for, where somebody says so.
        label: Option<String>,
        /// How its connections reach the server.
        path: ForwardPath,
    },
    /// It no longer does.
    Closed {
        /// The port on the host.
        port: NonZeroU16,
    },
    /// Somebody else has it.
    Taken {
        /// The port on the host.
        port: NonZeroU16,
        /// Who.
        holder: Holder,
    },
    /// It may not be exposed.
    Denied {
        /// The port inside.
        port: NonZeroU16,
        /// Why not.
        reason: DenyReason,
    },
    /// It may not be exposed by a rule of the daemon's own.
    Withheld {
        /// The port inside.
        port: NonZeroU16,
        /// Why not.
        reason: String,
    },
    /// It could not be listened on for another reason.
    Failed {
        /// The port on the host.
        port: NonZeroU16,
        /// The kernel's answer.
        detail: String,
    },
    /// Something is worth knowing.
    Note {
        /// What.
        text: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Something goes badly.
    Warning {
        /// What.
        text: String,
        /// What to do about it.
        hint: Option<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

/// Where reports go, and how they look.
#[derive(Clone, Copy, Debug)]
pub struct Talk {
    stream: Stream,
    json: bool,
    colour: bool,
}

impl Talk {
    /// To standard output, when it is ours.
    pub fn to_stdout(json: bool) -> Talk {
        Talk { stream: Stream::Stdout, json, colour: colour(&io::stdout()) }
    }

    /// To standard error.
    pub fn to_stderr(json: bool) -> Talk {
        Talk { stream: Stream::Stderr, json, colour: colour(&io::stderr()) }
    }

    /// Tells one report.
    pub fn report(&self, report: &Report) {
        if self.json { self.print(&to_json(report).to_string()) } else { self.print(&self.text(report)) }
    }

    /// Tells what ended a verb.
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

    /// Tells a text under a word.
    pub fn line(&self, word: &str, colour: Colour, text: &str) {
        self.print(&self.worded(word, colour, text));
    }

    /// A text behind its word of eight columns.
    pub fn worded(&self, word: &str, colour: Colour, text: &str) -> String {
        format!("{} {}", self.paint(&format!("{word:8}"), colour), escape(text))
    }

    /// Prints text that is ready as it is.
    pub fn plain(&self, text: &str) {
        self.print(text);
    }

    /// The same, for one who goes on only as long as somebody reads.
    ///
    /// # Errors
    /// Those of writing.
    pub fn try_plain(&self, text: &str) -> io::Result<()> {
        let line = format!("{text}\n");
        match self.stream {
            Stream::Stdout => io::stdout().write_all(line.as_bytes()).and_then(|()| io::stdout().flush()),
            Stream::Stderr => io::stderr().write_all(line.as_bytes()),
        }
    }

    /// Whether a person can answer [`Talk::ask`].
    pub fn can_ask() -> bool {
        io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// Asks a question on standard error and reads one line. Anything but `y` or `yes` is a no, and so is the end of the input.
    pub fn ask(&self, question: &str) -> bool {
        let mut error = io::stderr();
        let mut answer = String::new();
        let asked = error.write_all(question.as_bytes()).and_then(|()| error.flush());
        let read = asked.and_then(|()| io::stdin().read_line(&mut answer));
        read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
    }

    /// Colours a word, where there are colours.
    pub fn paint(&self, word: &str, colour: Colour) -> String {
        if self.colour { format!("\u{1b}[{}m{word}\u{1b}[0m", colour as u8) } else { word.to_owned() }
    }

    fn text(&self, report: &Report) -> String {
        match report {
            Report::Forward { port, name, process, label, path } => {
                let label = label.as_ref().map(|label| format!(" \"{}\"", escape(label))).unwrap_or_default();
                let who =
                    process.as_ref().map(|process| format!(" ({})", person(process))).unwrap_or_default();
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
                    format!("{word} localhost:{port} is held by {}", held_by(holder)),
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
                    "{} localhost:{port} cannot be listened on: {}",
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

    /// Nothing is left to be done about a terminal that is gone; the command goes on.
    fn print(&self, text: &str) {
        let _ = self.try_plain(text);
    }
}

/// The colours in use, by their number in ECMA-48.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Colour {
    /// It went wrong.
    Red = 31,
    /// It works.
    Green = 32,
    /// Somebody should look at it.
    Yellow = 33,
    /// It is by the way.
    Grey = 90,
}

/// Only on a terminal that knows colours, and not where `NO_COLOR` is set (<https://no-color.org>).
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

fn person(process: &ProcessFact) -> String {
    format!("{}, pid {}", escape(&process.name), process.pid)
}

fn held_by(holder: &Holder) -> String {
    match holder {
        Holder::Process(process, line) if line.is_empty() => person(process),
        Holder::Process(process, line) => {
            let short: String = line.chars().take(60).collect();
            let dots = if short.len() < line.len() { "…" } else { "" };
            format!("{} ({}{dots})", person(process), escape(&short))
        }
        Holder::User(user) => format!("a process of user {}", escape(user)),
        Holder::Unknown => "a process that is not visible from here".to_owned(),
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
            let mut told = json!({
                "event": "forward", "port": port, "url": format!("http://localhost:{port}"), "name": name,
                "path": path,
                "process": process.as_ref().map(|process| json!({ "name": process.name, "pid": process.pid })),
            });
            if let Some(label) = label {
                told["label"] = label.as_str().into();
            }
            told
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
