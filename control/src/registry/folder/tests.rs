use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use rustix::process::Pid;
use serde_json::json;
use tempfile::TempDir;

use super::test_support::TestHome;
use super::*;

const EXAMPLE: &str = r#"
[restart]
stop = ["/usr/local/bin/agent", "stop"]
start = ["/usr/local/bin/agent", "start"]
preflight = ["agent-check", "--quick"]

[jobs.renew]
command = ["renew-credential", "--file", "secrets.json"]
every = "24h"
gate = ["renew-credential", "--is-due"]
timeout = "2m"
restart = true

[secrets]
file = "secrets.json"
keys = ["kakaotalk"]
"#;

fn registration(cwd: &Path) -> Registration {
    let fields = json!({"containerName": "coder", "cwd": cwd});
    Registration::from_fields(fields.as_object().unwrap().clone()).unwrap()
}

fn folder_with(text: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, text);
    folder
}

fn write(folder: &TempDir, text: &str) {
    std::fs::write(folder.path().join(FILE), text).unwrap();
}

fn seal_in(folder: &TempDir, home: &TestHome) -> Registration {
    let mut registration = registration(folder.path());
    seal(&mut registration, home.approvals.file());
    registration
}

/// Approves a folder's file and reads it.
fn approve_and_seal(folder: &TempDir, home: &TestHome) -> Registration {
    home.approve(folder.path());
    seal_in(folder, home)
}

fn read_settings(registration: &Registration, home: &TestHome) -> Result<Folder, FolderError> {
    settings(registration, &home.approvals).map(|approved| approved.settings().clone())
}

fn not_trusted(secrets: bool) -> Result<Folder, FolderError> {
    Err(FolderError::NotTrusted { reason: NotTrusted::NotApproved, secrets })
}

/// Returns the reason why the file of a folder is refused.
fn refused(folder: &TempDir) -> String {
    let home = TestHome::new();
    read_settings(&seal_in(folder, &home), &home).unwrap_err().to_string()
}

fn refusal(text: &str) -> String {
    Folder::parse(text).unwrap_err().to_string()
}

#[test]
fn the_documented_example_is_parsed() {
    let folder = Folder::parse(EXAMPLE).unwrap();
    assert_eq!(folder.restart.stop.unwrap(), ["/usr/local/bin/agent", "stop"]);
    let job = &folder.jobs["renew"];
    assert_eq!((job.every, job.timeout), (Duration::from_secs(86_400), Duration::from_secs(120)));
    assert!(job.restart && job.gate.is_some() && !folder.trust_folder);
    assert_eq!(folder.secrets.unwrap().keys, ["kakaotalk"]);
}

#[test]
fn an_empty_file_configures_nothing() {
    assert_eq!(Folder::parse("").unwrap(), Folder::default());
}

#[test]
fn an_error_names_its_line() {
    assert!(
        refusal("\n[jobs.a]\ncommand = [\"x\"]\nevry = \"1h\"\n")
            .starts_with("landfall.toml line 4: unknown field `evry`")
    );
    assert_eq!(
        refusal("[jobs.a]\ncommand = []\nevery = \"1h\""),
        "landfall.toml line 2: a command has at least the name of a program"
    );
    assert_eq!(
        refusal("[jobs.a]\ncommand = [\"x\"]\nevery = \"often\""),
        "landfall.toml line 3: \"often\" is not a duration such as \"24h\" or \"90s\""
    );
    assert!(
        refusal("[jobs.a]\ncommand = [\"x\"]\nevery = \"999ms\"").contains("not between a second and a year")
    );
    assert!(refusal("[jobs.a]\ncommand = [\"x\"]\nevery = \"-1h\"").contains("line 3"));
    assert!(refusal("[jobs.\"a b\"]\ncommand = [\"x\"]\nevery = \"1h\"").contains("a job's name"));
    assert_eq!(
        refusal("\n[restart]\nstop = [\"x\"]"),
        "landfall.toml line 2: stop and start need each other"
    );
    assert!(
        refusal("[secrets]\nfile = \"../x\"\nkeys = []").contains("not the name of a file in the folder")
    );
    assert!(refusal("[restart\n").starts_with("landfall.toml line 1: "));
    assert!(!refusal("[restart\n").contains('\n'));
}

#[test]
fn durations_may_be_in_days() {
    let folder = Folder::parse("[jobs.a]\ncommand = [\"x\"]\nevery = \"1d 12h\"").unwrap();
    assert_eq!(folder.jobs["a"].every, Duration::from_secs(36 * 3_600));
}

#[test]
fn tools_are_a_request_with_bounded_names() {
    let folder = Folder::parse("[tools]\nwants = [\"claude\", \"sign_it-2\"]").unwrap();
    assert_eq!(folder.tools.unwrap().wants, ["claude", "sign_it-2"]);
    assert!(refusal("[tools]\nwants = [\"a b\"]").contains("a tool's name"));
    assert!(refusal("[tools]\nwants = [\"\"]").contains("a tool's name"));
    let many = vec!["\"a\""; 65].join(",");
    assert!(refusal(&format!("[tools]\nwants = [{many}]")).contains("65 tools are more than 64"));
}

#[test]
fn a_file_without_approval_has_no_effect() {
    let (home, folder) = (TestHome::new(), folder_with(EXAMPLE));
    let registration = seal_in(&folder, &home);
    assert!(!registration.unknown.contains_key(FIELD), "the text of a file without approval is not kept");
    assert_eq!(read_settings(&registration, &home), not_trusted(true));
    assert_eq!(withheld(&registration, &home.approvals)[0].reason, "is not trusted");
    // An approval of another content, or of the same content in another folder, has no effect.
    let other = folder_with(EXAMPLE);
    home.approve(other.path());
    assert_eq!(read_settings(&seal_in(&folder, &home), &home), not_trusted(true));
    home.approve(folder.path());
    write(&folder, &format!("{EXAMPLE}\n"));
    assert_eq!(read_settings(&seal_in(&folder, &home), &home), not_trusted(true));
}

#[test]
fn a_file_without_demands_needs_no_approval() {
    let home = TestHome::new();
    for text in ["", "# comment\n", "trust-folder = false\n[restart]\n[tools]\nwants = []\n"] {
        let registration = seal_in(&folder_with(text), &home);
        assert_eq!(read_settings(&registration, &home), Ok(Folder::default()));
        assert_eq!(withheld(&registration, &home.approvals), []);
    }
}

#[test]
fn text_that_an_earlier_release_stored_has_no_effect_without_approval() {
    let (home, folder) = (TestHome::new(), folder_with(EXAMPLE));
    let mut registration = registration(folder.path());
    registration.unknown.insert(FIELD.to_owned(), json!({"text": EXAMPLE}));
    assert_eq!(read_settings(&registration, &home), not_trusted(true));
    let before = registration.clone();
    assert!(!seal_if_approved(&mut registration, home.approvals.file()));
    assert_eq!(registration, before, "an earlier release can still read it");
    home.approve(folder.path());
    assert_eq!(read_settings(&registration, &home), Folder::parse(EXAMPLE));
}

#[test]
fn an_approval_from_before_the_start_takes_effect_at_the_start() {
    let (home, folder) = (TestHome::new(), folder_with(EXAMPLE));
    let mut registration = seal_in(&folder, &home);
    home.approve(folder.path());
    assert!(read_settings(&registration, &home).is_err());
    assert!(seal_if_approved(&mut registration, home.approvals.file()));
    assert_eq!(read_settings(&registration, &home), Folder::parse(EXAMPLE));
    assert!(!registration.unknown.contains_key(UNTRUSTED_FIELD));
    assert!(!seal_if_approved(&mut registration, home.approvals.file()));
}

#[test]
fn a_revoked_approval_has_no_effect() {
    let (home, folder) = (TestHome::new(), folder_with(EXAMPLE));
    let registration = approve_and_seal(&folder, &home);
    assert!(read_settings(&registration, &home).is_ok());
    home.revoke(folder.path());
    assert_eq!(read_settings(&registration, &home), not_trusted(true));
    assert_eq!(read_settings(&seal_in(&folder, &home), &home), not_trusted(true));
}

#[test]
fn a_folder_that_was_moved_or_replaced_by_a_link_is_not_approved() {
    let (home, outer) = (TestHome::new(), tempfile::tempdir().unwrap());
    let (one, two) = (outer.path().join("one"), outer.path().join("two"));
    std::fs::create_dir(&one).unwrap();
    std::fs::write(one.join(FILE), EXAMPLE).unwrap();
    home.approve(&one);
    let mut registration = registration(&one);
    seal(&mut registration, home.approvals.file());
    assert!(read_settings(&registration, &home).is_ok());
    std::fs::rename(&one, &two).unwrap();
    assert!(read_settings(&registration, &home).is_err());
    symlink(&two, &one).unwrap();
    assert!(read_settings(&registration, &home).is_err());
    // A link to the approved folder resolves to that folder.
    std::fs::remove_file(&one).unwrap();
    std::fs::rename(&two, &one).unwrap();
    symlink(&one, &two).unwrap();
    let mut linked = crate::registry::folder::tests::registration(&two);
    seal(&mut linked, home.approvals.file());
    assert!(read_settings(&linked, &home).is_ok());
}

#[test]
fn later_changes_by_the_container_have_no_effect() {
    let (home, folder) = (TestHome::new(), folder_with("[jobs.good]\ncommand = [\"true\"]\nevery = \"1h\""));
    let registration = approve_and_seal(&folder, &home);
    assert!(!differs(&registration));
    write(&folder, "[jobs.evil]\ncommand = [\"false\"]\nevery = \"1h\"");
    assert!(differs(&registration));
    let known: Vec<_> = read_settings(&registration, &home).unwrap().jobs.into_keys().collect();
    assert_eq!(known, ["good"]);
}

#[test]
fn a_file_that_appears_later_has_no_effect() {
    let (home, folder) = (TestHome::new(), tempfile::tempdir().unwrap());
    let registration = seal_in(&folder, &home);
    assert!(registration.unknown.is_empty());
    write(&folder, EXAMPLE);
    assert!(differs(&registration));
    assert_eq!(read_settings(&registration, &home).unwrap(), Folder::default());
}

#[test]
fn a_clients_values_for_the_folders_fields_are_dropped() {
    let (home, folder) = (TestHome::new(), tempfile::tempdir().unwrap());
    let mut registration = registration(folder.path());
    registration.unknown.insert(FIELD.to_owned(), json!({"text": EXAMPLE}));
    let untrusted = json!({"sha256": "0".repeat(64), "secrets": true});
    registration.unknown.insert(UNTRUSTED_FIELD.to_owned(), untrusted);
    seal(&mut registration, home.approvals.file());
    assert!(registration.unknown.is_empty());
}

#[test]
fn the_sealed_state_survives_the_registrations_file() {
    let (home, folder) = (TestHome::new(), folder_with(EXAMPLE));
    for (registration, wanted) in [
        (seal_in(&folder, &home), not_trusted(true)),
        (approve_and_seal(&folder, &home), Folder::parse(EXAMPLE)),
    ] {
        let kept = serde_json::to_value(registration).unwrap();
        let back = Registration::from_fields(kept.as_object().unwrap().clone()).unwrap();
        assert!(!differs(&back));
        assert_eq!(read_settings(&back, &home), wanted);
    }
}

#[test]
fn a_file_that_others_can_write_is_refused() {
    let folder = folder_with(EXAMPLE);
    std::fs::set_permissions(folder.path().join(FILE), std::fs::Permissions::from_mode(0o664)).unwrap();
    assert_eq!(refused(&folder), "landfall.toml may be written to by others; run chmod go-w on it");
}

#[test]
fn a_link_a_fifo_and_an_oversized_file_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    symlink("/etc/hostname", &path).unwrap();
    assert!(refused(&folder).contains("symbolic link"));
    std::fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .unwrap();
    assert!(refused(&folder).contains("not a regular file"));
    std::fs::remove_file(&path).unwrap();
    write(&folder, &"#".repeat(20_000));
    assert!(refused(&folder).contains("longer than"));
}

#[test]
fn a_file_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let folder = folder_with(EXAMPLE);
    std::os::unix::fs::chown(folder.path().join(FILE), Some(12_345), None).unwrap();
    assert!(refused(&folder).contains("belongs to user 12345"));
}

/// Returns a command of a folder whose file is approved.
fn command(home: &TestHome, folder: &TempDir, words: &[&str], trust: bool, timeout: Duration) -> Command {
    write(folder, &format!("trust-folder = {trust}\n[restart]\npreflight = {}\n", json!(words)));
    let registration = approve_and_seal(folder, home);
    let approved = settings(&registration, &home.approvals).unwrap();
    let words = approved.settings().restart.preflight.clone().unwrap();
    Command::new(&words, &approved, &registration.container_name, timeout)
}

fn shell(home: &TestHome, folder: &TempDir, script: &str, timeout: Duration) -> Command {
    command(home, folder, &["sh", "-c", script], false, timeout)
}

const LONG: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_command_runs_in_its_folder_with_a_minimal_environment() {
    let folder = tempfile::tempdir().unwrap();
    let ended =
        shell(&TestHome::new(), &folder, "env | sed 's/=.*//' | sort | tr '\\n' ' '; pwd > where", LONG)
            .of_restart(true)
            .run()
            .await
            .unwrap();
    assert!(ended.succeeded());
    // The shell sets PWD, and in some cases _ and others.
    for name in ended.last_line.split_whitespace() {
        let known =
            ["HOME", "LANDFALL_BUILD", "LANDFALL_CONTAINER_NAME", "PATH", "PWD", "SHLVL", "_", "OLDPWD"];
        assert!(known.contains(&name), "{name}");
    }
    let place = std::fs::read_to_string(folder.path().join("where")).unwrap();
    assert_eq!(Path::new(place.trim()), folder.path().canonicalize().unwrap());
}

#[tokio::test]
async fn the_last_line_of_a_large_output_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let ended = shell(
        &TestHome::new(),
        &folder,
        "yes | head -n 200000; printf 'the \\033[31mend\\n\\n' >&2; exit 3",
        LONG,
    )
    .run()
    .await;
    let ended = ended.unwrap();
    assert_eq!(ended.code, Some(3));
    assert_eq!(ended.last_line, "the \\u{1b}[31mend");
}

#[tokio::test]
async fn without_output_the_status_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(
        shell(&TestHome::new(), &folder, "exit 4", LONG).run().await.unwrap().last_line,
        "exit status: 4"
    );
    let ended = shell(&TestHome::new(), &folder, "kill -9 $$", LONG).run().await.unwrap();
    assert_eq!((ended.code, ended.last_line.as_str()), (None, "signal: 9 (SIGKILL)"));
}

#[tokio::test]
async fn a_command_over_its_time_limit_is_killed_with_its_children() {
    let folder = tempfile::tempdir().unwrap();
    let script = "sleep 1000 & echo $! > child; wait";
    let error = shell(&TestHome::new(), &folder, script, Duration::from_secs(1)).run().await.unwrap_err();
    assert_eq!(error, CommandError::TooLong(Duration::from_secs(1)));
    let child = std::fs::read_to_string(folder.path().join("child")).unwrap();
    let state = std::path::PathBuf::from(format!("/proc/{}/stat", child.trim()));
    // An orphan stays a zombie if no process waits for it.
    let gone = || std::fs::read_to_string(&state).map_or(true, |stat| stat.contains(") Z "));
    tokio::time::timeout(LONG, async {
        while !gone() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn processes_that_a_command_leaves_behind_continue() {
    let folder = tempfile::tempdir().unwrap();
    let ended = shell(&TestHome::new(), &folder, "sleep 1000 & echo $!", LONG).run().await.unwrap();
    let child = Pid::from_raw(ended.last_line.parse().unwrap()).unwrap();
    assert!(ended.succeeded());
    rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_program_in_the_folder_runs_only_if_the_folder_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("run.sh");
    std::fs::write(&script, "#!/bin/sh\necho ran\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let outside = tempfile::tempdir().unwrap();
    symlink(&script, outside.path().join("link")).unwrap();
    symlink("/bin/true", folder.path().join("true")).unwrap();
    let home = TestHome::new();
    let of = |name: &Path, trust| command(&home, &folder, &[name.to_str().unwrap()], trust, LONG);
    for name in [Path::new("./run.sh"), &script, &outside.path().join("link"), Path::new("./true")] {
        let error = of(name, false).run().await.unwrap_err();
        assert_eq!(error, CommandError::InFolder(name.to_str().unwrap().to_owned()));
    }
    assert_eq!(of(Path::new("./run.sh"), true).run().await.unwrap().last_line, "ran");
    assert_eq!(
        of(Path::new("no-such-program-anywhere"), true).run().await.unwrap_err().to_string(),
        "program \"no-such-program-anywhere\" was not found"
    );
}

#[tokio::test]
async fn a_command_does_not_start_after_its_approval_was_revoked() {
    let (home, folder) = (TestHome::new(), tempfile::tempdir().unwrap());
    let command = shell(&home, &folder, "touch ran", LONG);
    home.revoke(folder.path());
    assert_eq!(command.run().await, Err(CommandError::NotTrusted(NotTrusted::NotApproved)));
    // The file changed in the meantime, and the new content was approved.
    write(&folder, "[restart]\npreflight = [\"true\"]");
    home.approve(folder.path());
    assert_eq!(command.run().await, Err(CommandError::NotTrusted(NotTrusted::NotApproved)));
    assert!(!folder.path().join("ran").exists());
}

#[tokio::test]
async fn a_running_command_is_killed_when_its_approval_is_revoked() {
    let (home, folder) = (TestHome::new(), tempfile::tempdir().unwrap());
    let command = shell(&home, &folder, "touch ran; sleep 1000", LONG);
    let running = tokio::spawn(async move { command.run().await });
    tokio::time::timeout(LONG, async {
        while !folder.path().join("ran").exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    // The approval of another folder does not affect it.
    let other = folder_with(EXAMPLE);
    home.approve(other.path());
    home.revoke(other.path());
    tokio::task::yield_now().await;
    assert!(!running.is_finished());
    home.revoke(folder.path());
    let ended = tokio::time::timeout(LONG, running).await.unwrap().unwrap();
    assert_eq!(ended, Err(CommandError::NotTrusted(NotTrusted::NotApproved)));
}

#[tokio::test]
async fn a_folder_without_a_file_runs_no_command() {
    let home = TestHome::new();
    let registration = registration(home.path());
    let approved = settings(&registration, &home.approvals).unwrap();
    let command = Command::new(&["true".to_owned()], &approved, &registration.container_name, LONG);
    assert_eq!(command.run().await, Err(CommandError::NotTrusted(NotTrusted::NotApproved)));
}
