//! `landfall trust`: the user approves what the files of a folder ask for.
//!
//! The files are read once. What is printed and the digest that is approved come from the same bytes, so a file that is
//! replaced while the user reads is not approved.

mod offer;
mod review;

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::args::TrustArgs;
use super::exit::{Exit, Failure};
use super::start;
use crate::cli::daemon_client::{self, Container};
use crate::cli::ui::output::{Colour, Report, Talk};
use crate::cli::ui::table::table;
use crate::daemon::rpc::client::{CallError, Client, PATIENT_BUDGET};
use crate::error::chain;
use crate::model::trust::{Approval, ContentDigest, TrustFormatError};
use crate::registry::folder::Withheld;
use crate::registry::trust_file::{TrustFile, TrustFileError, Updated};
use crate::sys::paths::Home;

pub(super) use offer::offer;
use review::{Review, command_for};

/// The files of registered folders that only lack an approval, each once.
pub(super) fn withheld(containers: &[Container]) -> Vec<&Withheld> {
    let mut missing: Vec<&Withheld> = Vec::new();
    for one in containers.iter().flat_map(|container| &container.withheld) {
        if one.needs_trust && !missing.contains(&one) {
            missing.push(one);
        }
    }
    missing
}

/// Prints them, a line for each.
pub(super) fn print_withheld(talk: Talk, containers: &[Container]) {
    for one in withheld(containers) {
        let (word, text) = sentence(one, &format!(" of {}", one.folder.display()));
        talk.line(word, Colour::Yellow, &text);
    }
}

/// The same for one container, with every other reason.
pub(super) fn print_withheld_of(talk: Talk, container: &Container) {
    for one in &container.withheld {
        let (word, text) = sentence(one, "");
        talk.line(word, Colour::Yellow, &text);
    }
}

fn sentence(withheld: &Withheld, of_folder: &str) -> (&'static str, String) {
    let Withheld { folder, file, reason, needs_trust, ports } = withheld;
    let attach_method = match needs_trust {
        true => format!(" ({})", command_for(&folder.display().to_string(), "")),
        false => String::new(),
    };
    let said = format!("{file}{of_folder} {reason}{attach_method}");
    if ports.is_empty() {
        return ("commands", format!("off: {said}"));
    }
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    ("ports", format!("{} off: {said}", ports.join(", ")))
}

/// The one question of an approval.
const QUESTION: &str = "Trust exactly this content? It takes effect on this host, with your rights. [y/N] ";

/// Approves, shows, revokes or lists.
pub fn trust(args: &TrustArgs) -> Result<Exit, Failure> {
    let home = daemon_client::home()?;
    let talk = Talk::to_stdout(args.json);
    if args.list {
        return list(&TrustFile::of(&home), talk, args.json);
    }
    if args.revoke {
        return revoke(&home, args);
    }
    let folder = start::folder(args.folder.as_deref())?;
    let review = Review::of(&folder, &TrustFile::of(&home))?;
    if args.show {
        if let Err(error) = TrustFile::of(&home).read() {
            let Failure { message, hint, .. } = failed(&error);
            Talk::to_stderr(args.json).report(&Report::Warning { text: message, hint });
        }
        review.show(talk, args.json);
        return Ok(Exit::Ok);
    }
    if !args.json {
        review.print(talk);
    }
    if review.asks_for_nothing() {
        if args.json {
            talk.plain(&review.to_json().to_string());
        } else {
            talk.line("trust", Colour::Grey, "the files of this folder ask for nothing that needs approval");
        }
        return Ok(Exit::Ok);
    }
    if !args.yes && !review.is_trusted() {
        confirm(args, &review)?;
    }
    review.approve(&home, Talk::to_stderr(args.json))?;
    let told = tell_daemon(&home, &folder.text, args.json)?;
    if args.json {
        let mut value = Review::of(&folder, &TrustFile::of(&home))?.to_json();
        value["containers"] = told.clone().unwrap_or_default().into();
        talk.plain(&value.to_string());
    } else {
        talk.line(
            "trusted",
            Colour::Green,
            &format!("{}{}", folder.text, effect(told.as_deref(), "in effect")),
        );
    }
    Ok(Exit::Ok)
}

fn confirm(args: &TrustArgs, review: &Review) -> Result<(), Failure> {
    let aside = Talk::to_stderr(args.json);
    let hint = format!("{} approves it without a question", review.command("--yes"));
    if args.json || !Talk::can_ask() {
        let text = "nothing was approved: there is no terminal to ask on";
        return Err(Failure::new(Exit::Refused, text).hint(hint));
    }
    match aside.ask(QUESTION) {
        true => Ok(()),
        false => Err(Failure::new(Exit::Refused, "nothing was approved")),
    }
}

fn revoke(home: &Home, args: &TrustArgs) -> Result<Exit, Failure> {
    let named = args.folder.clone().unwrap_or_else(|| PathBuf::from("."));
    // A folder that is gone has an approval all the same.
    let path = named.canonicalize().or_else(|_| std::path::absolute(&named));
    let path = path.ok().and_then(|path| path.to_str().map(str::to_owned)).ok_or_else(|| {
        Failure::new(Exit::Missing, format!("the folder {} cannot be used", named.display()))
    })?;
    home.ensure_directories().map_err(|error| Failure::new(Exit::Failed, chain(&error)))?;
    let updated = TrustFile::of(home).update(|trust| trust.revoke(&path)).map_err(|error| failed(&error))?;
    report_set_aside(&updated, Talk::to_stderr(args.json));
    let told = tell_daemon(home, &path, args.json)?;
    if !updated.value {
        return Err(Failure::new(Exit::Missing, format!("{path} is not trusted"))
            .hint("landfall trust --list shows the folders that are"));
    }
    let talk = Talk::to_stdout(args.json);
    if args.json {
        let containers = told.unwrap_or_default();
        talk.plain(&json!({ "revoked": path, "containers": containers }).to_string());
    } else {
        talk.line(
            "revoked",
            Colour::Grey,
            &format!("{path}{}", effect(told.as_deref(), "no longer in effect")),
        );
    }
    Ok(Exit::Ok)
}

fn list(file: &TrustFile, talk: Talk, as_json: bool) -> Result<Exit, Failure> {
    let trust = file.read().map_err(|error| failed(&error))?;
    let rows: Vec<_> = trust.approvals().collect();
    if as_json {
        let entry = |(folder, file, approval): &(&str, &str, &Approval)| {
            json!({
                "folder": folder, "file": file, "sha256": approval.sha256,
                "approvedAt": approval.approved_at, "now": now(folder, file, approval),
            })
        };
        talk.plain(&json!({ "trusted": rows.iter().map(entry).collect::<Vec<_>>() }).to_string());
    } else if rows.is_empty() {
        talk.report(&Report::Note {
            text: "no folder is trusted".to_owned(),
            hint: Some("landfall trust DIR prints what a folder asks for, and asks you".to_owned()),
        });
    } else {
        let row = |(folder, file, approval): &(&str, &str, &Approval)| {
            let at = approval.approved_at.clone().unwrap_or_default();
            [(*folder).to_owned(), (*file).to_owned(), at, now(folder, file, approval).to_owned()]
        };
        let rows: Vec<_> = rows.iter().map(row).collect();
        talk.plain(&table(["FOLDER", "FILE", "APPROVED", "NOW"], &rows));
    }
    Ok(Exit::Ok)
}

/// Compares the file with the approved content, in a word.
fn now(folder: &str, file: &str, approval: &Approval) -> &'static str {
    match std::fs::read(Path::new(folder).join(file)) {
        Ok(content) if ContentDigest::of(&content) == approval.sha256 => "as approved",
        Ok(_) => "changed",
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "gone",
        Err(_) => "unreadable",
    }
}

/// Has a daemon that runs read the folder again. Returns the containers that are registered with it; none where no daemon
/// runs.
fn tell_daemon(home: &Home, folder: &str, as_json: bool) -> Result<Option<Vec<String>>, Failure> {
    let request = json!({ "kind": "read-folder", "folder": folder });
    match Client::new(home.socket()).within(PATIENT_BUDGET).call(&request) {
        Ok(answer) => {
            let names = answer.get("containers").and_then(Value::as_array).into_iter().flatten();
            Ok(Some(names.filter_map(Value::as_str).map(str::to_owned).collect()))
        }
        Err(error) if error.is_absent() => Ok(None),
        Err(CallError::Refused(reason)) if reason == "unknown request kind" => {
            let text = "the daemon that runs is of another build, and does not take this up".to_owned();
            let hint = Some("landfall up puts this build in its place".to_owned());
            Talk::to_stderr(as_json).report(&Report::Warning { text, hint });
            Ok(None)
        }
        Err(error) => Err(daemon_client::failed(&error)),
    }
}

/// The end of a sentence: the containers that the change affects.
fn effect(containers: Option<&[String]>, state: &str) -> String {
    match containers {
        Some(names) if !names.is_empty() => format!("; {state} for {}", names.join(", ")),
        _ => String::new(),
    }
}

fn report_set_aside<T>(updated: &Updated<T>, aside: Talk) {
    if let Some((reason, kept)) = &updated.set_aside {
        let text = format!("{reason}; it is kept as {}, and a new list was started", kept.display());
        let hint = Some("folders that you trusted before need landfall trust DIR again".to_owned());
        aside.report(&Report::Warning { text, hint });
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
            failure.hint("the file must be yours, and writable by no one else; then landfall trust DIR again")
        }
        TrustFileError::System { .. } => failure,
    }
}

/// The time of an approval, for people.
fn timestamp() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
