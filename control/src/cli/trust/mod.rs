//! `landfall trust`: the user approves what the files of a folder request.
//!
//! The files are read once. The printed text and the approved digest come from the same bytes, so a file that is
//! replaced while the user reads the text is not approved.

mod offer;
mod review;

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::args::TrustArgs;
use super::exit::{Exit, Failure};
use super::start;
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer, Report};
use crate::cli::ui::table::table;
use crate::daemon::rpc::client::{CallError, Client, PATIENT_BUDGET};
use crate::daemon::rpc::request_handler::DescribedContainer;
use crate::error::chain;
use crate::model::trust::{Approval, ContentDigest, TrustFormatError};
use crate::registry::folder::Withheld;
use crate::registry::trust_file::{TrustFile, TrustFileError, Updated};
use crate::sys::paths::Home;

pub(super) use offer::offer;
use review::{Review, command_for};

/// Returns the files of registered folders that have no effect for want of an approval, each once.
pub(super) fn withheld(containers: &[DescribedContainer]) -> Vec<&Withheld> {
    let mut missing: Vec<&Withheld> = Vec::new();
    for one in containers.iter().flat_map(|container| &container.withheld) {
        if one.needs_trust && !missing.contains(&one) {
            missing.push(one);
        }
    }
    missing
}

/// Prints one line for each of these files.
pub(super) fn print_withheld(printer: Printer, containers: &[DescribedContainer]) {
    for one in withheld(containers) {
        let (word, text) = sentence(one, &format!(" of {}", one.folder.display()));
        printer.line(word, Colour::Yellow, &text);
    }
}

/// Prints one line for each file of one container that has no effect, for whatever reason.
pub(super) fn print_withheld_of(printer: Printer, container: &DescribedContainer) {
    for one in &container.withheld {
        let (word, text) = sentence(one, "");
        printer.line(word, Colour::Yellow, &text);
    }
}

fn sentence(withheld: &Withheld, of_folder: &str) -> (&'static str, String) {
    let Withheld { folder, file, reason, needs_trust, ports } = withheld;
    let attach_method = match needs_trust {
        true => format!(" ({})", command_for(&folder.display().to_string(), "")),
        false => String::new(),
    };
    let declared = format!("{file}{of_folder} {reason}{attach_method}");
    if ports.is_empty() {
        return ("commands", format!("off: {declared}"));
    }
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    ("ports", format!("{} off: {declared}", ports.join(", ")))
}

/// The question of an approval.
const QUESTION: &str = "Trust exactly this content? It takes effect on this host, with your rights. [y/N] ";

/// Runs the verb.
pub fn trust(args: &TrustArgs) -> Result<Exit, Failure> {
    let home = daemon_client::home()?;
    let printer = Printer::to_stdout(args.json);
    if args.list {
        return list(&TrustFile::of(&home), printer, args.json);
    }
    if args.revoke {
        return revoke(&home, args);
    }
    let folder = start::folder(args.folder.as_deref())?;
    let review = Review::of(&folder, &TrustFile::of(&home))?;
    if args.show {
        if let Err(error) = TrustFile::of(&home).read() {
            let Failure { message, hint, .. } = failed(&error);
            Printer::to_stderr(args.json).report(&Report::Warning { text: message, hint });
        }
        review.show(printer, args.json);
        return Ok(Exit::Ok);
    }
    if !args.json {
        review.print(printer);
    }
    if review.is_empty() {
        if args.json {
            printer.print(&review.to_json().to_string());
        } else {
            printer.line(
                "trust",
                Colour::Grey,
                "the files of this folder request nothing that needs approval",
            );
        }
        return Ok(Exit::Ok);
    }
    if !args.yes && !review.is_trusted() {
        confirm(args, &review)?;
    }
    review.approve(&home, Printer::to_stderr(args.json))?;
    let affected = notify_daemon(&home, &folder.text, args.json)?;
    if args.json {
        let mut value = Review::of(&folder, &TrustFile::of(&home))?.to_json();
        value["containers"] = affected.clone().unwrap_or_default().into();
        printer.print(&value.to_string());
    } else {
        printer.line(
            "trusted",
            Colour::Green,
            &format!("{}{}", folder.text, effect(affected.as_deref(), "in effect")),
        );
    }
    Ok(Exit::Ok)
}

fn confirm(args: &TrustArgs, review: &Review) -> Result<(), Failure> {
    let stderr = Printer::to_stderr(args.json);
    let hint = format!("{} approves it without asking", review.command("--yes"));
    if args.json || !Printer::can_ask() {
        let text = "nothing was approved, since there is no terminal to ask on";
        return Err(Failure::new(Exit::Refused, text).hint(hint));
    }
    match stderr.ask(QUESTION) {
        true => Ok(()),
        false => Err(Failure::new(Exit::Refused, "nothing was approved")),
    }
}

fn revoke(home: &Home, args: &TrustArgs) -> Result<Exit, Failure> {
    let named = args.folder.clone().unwrap_or_else(|| PathBuf::from("."));
    // A folder that was removed can still have an approval.
    let path = named.canonicalize().or_else(|_| std::path::absolute(&named));
    let path = path.ok().and_then(|path| path.to_str().map(str::to_owned)).ok_or_else(|| {
        Failure::new(Exit::Missing, format!("the folder {} cannot be used", named.display()))
    })?;
    home.ensure_directories().map_err(|error| Failure::new(Exit::Failed, chain(&error)))?;
    let updated = TrustFile::of(home).update(|trust| trust.revoke(&path)).map_err(|error| failed(&error))?;
    report_set_aside(&updated, Printer::to_stderr(args.json));
    let affected = notify_daemon(home, &path, args.json)?;
    if !updated.value {
        return Err(Failure::new(Exit::Missing, format!("{path} is not trusted"))
            .hint("landfall trust --list shows the folders that are"));
    }
    let printer = Printer::to_stdout(args.json);
    if args.json {
        let containers = affected.unwrap_or_default();
        printer.print(&json!({ "revoked": path, "containers": containers }).to_string());
    } else {
        printer.line(
            "revoked",
            Colour::Grey,
            &format!("{path}{}", effect(affected.as_deref(), "no longer in effect")),
        );
    }
    Ok(Exit::Ok)
}

fn list(file: &TrustFile, printer: Printer, as_json: bool) -> Result<Exit, Failure> {
    let trust = file.read().map_err(|error| failed(&error))?;
    let rows: Vec<_> = trust.approvals().collect();
    if as_json {
        let entry = |(folder, file, approval): &(&str, &str, &Approval)| {
            json!({
                "folder": folder, "file": file, "sha256": approval.sha256,
                "approvedAt": approval.approved_at, "now": file_state(folder, file, approval),
            })
        };
        printer.print(&json!({ "trusted": rows.iter().map(entry).collect::<Vec<_>>() }).to_string());
    } else if rows.is_empty() {
        printer.report(&Report::Note {
            text: "no folder is trusted".to_owned(),
            hint: Some("landfall trust DIR prints what a folder requests, and asks you".to_owned()),
        });
    } else {
        let row = |(folder, file, approval): &(&str, &str, &Approval)| {
            let at = approval.approved_at.clone().unwrap_or_default();
            [(*folder).to_owned(), (*file).to_owned(), at, file_state(folder, file, approval).to_owned()]
        };
        let rows: Vec<_> = rows.iter().map(row).collect();
        printer.print(&table(["FOLDER", "FILE", "APPROVED", "NOW"], &rows));
    }
    Ok(Exit::Ok)
}

/// Compares the file with the approved content, and returns the result as a word.
fn file_state(folder: &str, file: &str, approval: &Approval) -> &'static str {
    match std::fs::read(Path::new(folder).join(file)) {
        Ok(content) if ContentDigest::of(&content) == approval.sha256 => "as approved",
        Ok(_) => "changed",
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "gone",
        Err(_) => "unreadable",
    }
}

/// Asks a running daemon to read the folder again. Returns the containers that are registered with the folder; `None`
/// if no daemon runs.
fn notify_daemon(home: &Home, folder: &str, as_json: bool) -> Result<Option<Vec<String>>, Failure> {
    let request = json!({ "kind": "read-folder", "folder": folder });
    match Client::new(home.socket()).within(PATIENT_BUDGET).call(&request) {
        Ok(answer) => {
            let names = answer.get("containers").and_then(Value::as_array).into_iter().flatten();
            Ok(Some(names.filter_map(Value::as_str).map(str::to_owned).collect()))
        }
        Err(error) if error.is_absent() => Ok(None),
        Err(CallError::Refused(reason)) if reason == "unknown request kind" => {
            let text = "the running daemon is another build, and does not apply this change".to_owned();
            let hint = Some("landfall up replaces it with this build".to_owned());
            Printer::to_stderr(as_json).report(&Report::Warning { text, hint });
            Ok(None)
        }
        Err(error) => Err(daemon_client::call_failure(&error)),
    }
}

/// Returns the end of a sentence: the containers that the change affects.
fn effect(containers: Option<&[String]>, state: &str) -> String {
    match containers {
        Some(names) if !names.is_empty() => format!("; {state} for {}", names.join(", ")),
        _ => String::new(),
    }
}

fn report_set_aside<T>(updated: &Updated<T>, stderr: Printer) {
    if let Some((reason, kept)) = &updated.set_aside {
        let text = format!("{reason}; it is kept as {}, and a new list was started", kept.display());
        let hint = Some("folders that you trusted before need landfall trust DIR again".to_owned());
        stderr.report(&Report::Warning { text, hint });
    }
}

fn failed(error: &TrustFileError) -> Failure {
    let failure = Failure::new(Exit::Failed, error.to_string());
    match error {
        TrustFileError::Format { reason: TrustFormatError::Newer(_), .. } => failure
            .hint("nothing is trusted now; use that release, or remove the file and trust each folder again"),
        TrustFileError::Format { .. } | TrustFileError::NotAFile(_) | TrustFileError::TooLarge(_) => failure
            .hint("nothing is trusted now; landfall trust DIR sets the file aside and starts a new list"),
        TrustFileError::Owner { .. } | TrustFileError::Writable(_) => {
            failure.hint("only you may own and write the file; then run landfall trust DIR again")
        }
        TrustFileError::System { .. } => failure,
    }
}

/// Returns the time of an approval, as text for people.
fn timestamp() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
