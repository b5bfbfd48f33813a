//! Claim 30 at the daemon: the files of a folder run no command on the host until their user approved exactly their bytes.
//!
//! Each command of a folder writes a line to a diary outside of the folder. A case that expects no line registers a further
//! container last, whose file is approved: its line shows that commands run, and that enough time has passed for the others.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use landfall_tests::case::Case;
use landfall_tests::rpc::{ask, done, http_port, refused, register, register_with};
use landfall_tests::{FakeDocker, Home, Namespace, Server, connect, http, wait_until};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("c30_a_planted_file_runs_no_command_until_it_is_trusted", planted),
    Case::once("c30_a_changed_file_needs_a_new_approval", changed),
    Case::once("c30_text_stored_by_an_earlier_release_runs_no_command_on_replay", kept_before_approvals),
    Case::once("c30_an_approval_without_a_daemon_takes_effect_at_the_next_start", trusted_without_daemon),
    Case::once("c30_revoking_kills_what_runs_and_turns_commands_off", revoked),
    Case::once("c30_a_container_that_is_made_again_runs_what_was_trusted", made_again),
    Case::once("c30_a_corrupt_list_of_approvals_approves_no_file", corrupt_list),
    Case::once("c30_a_file_that_others_could_write_is_never_trusted", files_of_others),
    Case::once("c30_secrets_of_a_file_need_its_approval", secrets),
    Case::once("c30_ports_below_1024_of_a_folder_need_its_approval", ports),
];

fn diary(home: &Home) -> PathBuf {
    home.folder("outside").join("diary")
}

pub(crate) fn lines(home: &Home) -> Vec<String> {
    std::fs::read_to_string(diary(home)).unwrap_or_default().lines().map(str::to_owned).collect()
}

#[track_caller]
pub(crate) fn wait_for_line(home: &Home, wanted: &str, count: usize) {
    wait_until(&format!("{wanted:?} in the diary, {count} times"), || {
        let lines = lines(home);
        let found = lines.iter().filter(|line| *line == wanted).count();
        if found >= count { Ok(()) } else { Err((lines, home.events())) }
    });
}

/// A command that runs `script` with the diary as `$1`.
fn shell(home: &Home, script: &str) -> Value {
    json!(["sh", "-c", script, "sh", diary(home)])
}

/// A file in which every command writes `who` and the command's purpose.
pub(crate) fn commands(home: &Home, who: &str) -> String {
    let note = |what: &str| shell(home, &format!("echo {who} {what} >> $1"));
    format!(
        "[restart]\npreflight = {}\nstop = {}\nstart = {}\n[jobs.tick]\ncommand = {}\ngate = {}\nevery = \"1h\"\n",
        note("preflight"),
        note("stop"),
        note("start"),
        note("job"),
        note("gate")
    )
}

pub(crate) fn write(folder: &Path, text: &str) {
    std::fs::write(folder.join("landfall.toml"), text).unwrap();
}

/// Registers a container whose file is approved, and waits for its command. Asserts that the diary contains only its lines.
#[track_caller]
pub(crate) fn only_control_runs(home: &Home) {
    let folder = home.folder("control");
    write(&folder, &commands(home, "control"));
    home.trust(&folder);
    register(home, "control");
    wait_for_line(home, "control job", 1);
    let lines = lines(home);
    assert!(lines.iter().all(|line| line.starts_with("control ")), "{lines:?}");
}

fn restart(name: &str) -> Value {
    json!({"kind": "restart", "containerName": name})
}

/// Restarts a container and waits for the end of the restart.
#[track_caller]
fn restarted(home: &Home, name: &str) {
    let before = home.count_events("restart-completed", name);
    assert_eq!(ask(home, &restart(name))["ok"], true);
    wait_until("the restart to end", || {
        if home.count_events("restart-completed", name) > before { Ok(()) } else { Err(home.events()) }
    });
}

/// Returns the output of `status`.
#[track_caller]
pub(crate) fn status(home: &Home, arguments: &[&str]) -> String {
    let output = home.run(&[&["status"], arguments].concat());
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn planted() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    let folder = home.folder("a");
    write(&folder, &commands(&home, "a"));
    // As a client of the reference registers it.
    register_with(&home, "a", &json!({"restartToken": "t"}));
    restarted(&home, "a");
    assert_eq!(http::ask(http_port(&home), Some("t"), &restart("a")).body["ok"], true);
    docker.wait_for_calls("POST /containers/a/start", 2);
    only_control_runs(&home);
    let hint = format!("(landfall trust {})", folder.display());
    let off = "commands off: landfall.toml is not trusted";
    assert!(status(&home, &["a"]).contains(&format!("{off} {hint}\n")), "{}", status(&home, &["a"]));
    let of_folder = format!("commands off: landfall.toml of {} is not trusted {hint}\n", folder.display());
    assert!(status(&home, &[]).contains(&of_folder), "{}", status(&home, &[]));
    let up = home.run(&["up"]);
    assert!(String::from_utf8_lossy(&up.stdout).contains(&of_folder), "{up:?}");
    // A release without approvals, which would run the text, does not find it either.
    assert_eq!(home.registered("a").unwrap().get("folder"), None);
    home.trust(&folder);
    assert_eq!(home.mode("trust.json"), 0o600);
    wait_for_line(&home, "a job", 1);
    assert_eq!(ask(&home, &restart("a"))["ok"], true);
    wait_for_line(&home, "a start", 1);
    let own: Vec<String> = lines(&home).into_iter().filter(|line| line.starts_with("a ")).collect();
    assert_eq!(own, ["a gate", "a job", "a preflight", "a stop", "a start"]);
    assert!(!status(&home, &["a"]).contains("commands"));
    assert!(!status(&home, &[]).contains("commands"));
}

fn changed() {
    let home = Home::new();
    let _docker = FakeDocker::start(&home, &["a"]);
    let daemon = home.daemon();
    let folder = home.folder("a");
    write(&folder, &commands(&home, "old"));
    home.trust(&folder);
    register(&home, "a");
    wait_for_line(&home, "old job", 1);
    // The approved commands stay in effect when the container changes the file, also with the next daemon.
    write(&folder, &commands(&home, "new"));
    restarted(&home, "a");
    wait_for_line(&home, "old start", 1);
    daemon.kill();
    let _daemon = home.daemon();
    wait_for_line(&home, "old job", 2);
    // The next registration finds a file without an approval.
    register(&home, "a");
    restarted(&home, "a");
    let before = lines(&home);
    assert!(before.iter().all(|line| line.starts_with("old ")), "{before:?}");
    std::fs::remove_file(diary(&home)).unwrap();
    only_control_runs(&home);
    // The old content needs a new approval, too, after the new content was approved.
    home.trust(&folder);
    wait_for_line(&home, "new job", 1);
    std::fs::remove_file(diary(&home)).unwrap();
    write(&folder, &commands(&home, "old"));
    register(&home, "a");
    only_control_runs(&home);
}

fn kept_before_approvals() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let folder = home.folder("a");
    let text = commands(&home, "a");
    write(&folder, &text);
    let kept = json!({"containerName": "a", "cwd": folder, "restartToken": "t", "folder": {"text": text}});
    let file = home.write_registration("a", kept.to_string());
    let _daemon = home.daemon();
    restarted(&home, "a");
    assert_eq!(docker.calls("POST /containers/a/start"), 1);
    only_control_runs(&home);
    let up = home.run(&["up"]);
    let hint = format!("landfall trust {}", folder.display());
    assert!(String::from_utf8_lossy(&up.stdout).contains(&hint), "{up:?}");
    assert!(status(&home, &["a"]).contains("commands off: landfall.toml is not trusted"));
    assert_eq!(std::fs::read_to_string(file).unwrap(), kept.to_string(), "nothing of it is lost");
    home.trust(&folder);
    wait_for_line(&home, "a job", 1);
    restarted(&home, "a");
    wait_for_line(&home, "a start", 1);
}

fn trusted_without_daemon() {
    let home = Home::new();
    let _docker = FakeDocker::start(&home, &["a"]);
    let daemon = home.daemon();
    let folder = home.folder("a");
    write(&folder, &commands(&home, "a"));
    register(&home, "a");
    daemon.kill();
    let daemon = home.daemon();
    only_control_runs(&home);
    daemon.kill();
    home.trust(&folder);
    let daemon = home.daemon();
    wait_for_line(&home, "a job", 1);
    // The same for a withdrawal.
    daemon.kill();
    let revoked = home.command(&["trust", "--revoke"]).arg(&folder).output().unwrap();
    assert!(revoked.status.success(), "{revoked:?}");
    std::fs::remove_file(diary(&home)).unwrap();
    let _daemon = home.daemon();
    only_control_runs(&home);
}

fn revoked() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    let folder = home.folder("a");
    let long = shell(&home, "echo $$ >> $1; exec sleep 1000");
    let text = format!("[jobs.long]\ncommand = {long}\nevery = \"1s\"\n{}", commands(&home, "a"));
    write(&folder, &text);
    home.trust(&folder);
    register(&home, "a");
    wait_for_line(&home, "a job", 1);
    let pid = wait_until("the long job", || {
        let lines = lines(&home);
        lines.iter().find_map(|line| line.parse::<u32>().ok()).ok_or(lines)
    });
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    let revoked = home.command(&["trust", "--revoke", "--json"]).arg(&folder).output().unwrap();
    let revoked: Value = serde_json::from_slice(&revoked.stdout).unwrap();
    assert_eq!(revoked, json!({"revoked": folder, "containers": ["a"]}));
    wait_until("the job to be killed", || {
        if Path::new(&format!("/proc/{pid}")).exists() { Err(home.events()) } else { Ok(()) }
    });
    let event = home.wait_for_event("job-tick-error", |event| event["job"] == "long");
    assert_eq!(event["error"], "landfall.toml is not trusted");
    std::fs::remove_file(diary(&home)).unwrap();
    restarted(&home, "a");
    assert_eq!(docker.calls("POST /containers/a/start"), 1);
    // The interval of the long job passes.
    let control = home.folder("beat");
    let beat = shell(&home, "echo control beat >> $1");
    write(&control, &format!("[jobs.beat]\ncommand = {beat}\nevery = \"1s\"\n"));
    home.trust(&control);
    register(&home, "beat");
    wait_for_line(&home, "control beat", 3);
    only_control_runs(&home);
    let again = home.command(&["trust", "--revoke"]).arg(&folder).output().unwrap();
    assert_eq!(again.status.code(), Some(3), "{again:?}");
}

fn made_again() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    let attach = |name: &str| {
        // A container that does not run is attached at once, without a wait.
        docker.add(name, false);
        let folder = home.folder(name);
        home.command(&["attach", name, "--cwd"]).arg(&folder).output().unwrap();
        assert!(home.registered(name).is_some());
        folder
    };
    write(&home.folder("b"), &commands(&home, "b"));
    write(&home.folder("a"), &commands(&home, "a"));
    home.trust(&home.folder("a"));
    let a = attach("a");
    attach("b");
    wait_for_line(&home, "a job", 1);
    // The container changes its folder and is created again: the daemon registers it again.
    write(&a, &commands(&home, "evil"));
    for name in ["a", "b"] {
        docker.remove(name, false);
        docker.launch(name, &[]);
        let id = docker.id(name);
        wait_until("the new container to be known", || {
            let registered = home.registered(name).unwrap_or_default();
            if registered["discovered"]["id"] == json!(id) {
                Ok(())
            } else {
                Err((registered, home.events()))
            }
        });
    }
    wait_for_line(&home, "a job", 2);
    let all = lines(&home);
    assert!(all.iter().all(|line| line.starts_with("a ")), "{all:?}");
    assert!(status(&home, &["b"]).contains("commands off: landfall.toml is not trusted"));
}

fn corrupt_list() {
    let home = Home::new();
    let daemon = home.daemon();
    let folder = home.folder("a");
    write(&folder, &commands(&home, "a"));
    home.trust(&folder);
    register(&home, "a");
    wait_for_line(&home, "a job", 1);
    daemon.shut_down();
    std::fs::remove_file(diary(&home)).unwrap();
    let list = home.path().join("trust.json");
    std::fs::write(&list, "{\"formatVersion\":1,\"folders\":").unwrap();
    let _daemon = home.daemon();
    home.wait_for_event("notice", |event| {
        event["text"].as_str().is_some_and(|text| text.starts_with("no file of any folder is trusted: "))
    });
    let off = status(&home, &["a"]);
    assert!(
        off.contains("commands off: landfall.toml is not trusted: ") && off.contains("not JSON"),
        "{off}"
    );
    let listed = home.run(&["trust", "--list"]);
    assert_eq!(listed.status.code(), Some(125), "{listed:?}");
    assert!(String::from_utf8_lossy(&listed.stderr).contains("hint: "), "{listed:?}");
    // The next approval starts a new list and keeps the old file.
    only_control_runs(&home);
    assert!(home.path().join("trust.json.bad-1").exists());
    assert!(status(&home, &["a"]).contains("commands off: landfall.toml is not trusted ("));
    home.trust(&folder);
    wait_for_line(&home, "a job", 1);
}

fn files_of_others() {
    let home = Home::new();
    let _daemon = home.daemon();
    let elsewhere = home.folder("elsewhere");
    write(&elsewhere, &commands(&home, "link"));
    let mode = |folder: &Path| {
        write(folder, &commands(&home, "mode"));
        let permissions = PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(folder.join("landfall.toml"), permissions).unwrap();
    };
    let link = |folder: &Path| {
        symlink(elsewhere.join("landfall.toml"), folder.join("landfall.toml")).unwrap();
    };
    let owner = |folder: &Path| {
        write(folder, &commands(&home, "owner"));
        std::os::unix::fs::chown(folder.join("landfall.toml"), Some(12_345), None).unwrap();
    };
    let invalid = |folder: &Path| write(folder, "[jobs.x]\nevery = \"1s\"\n");
    type Plant<'a> = &'a dyn Fn(&Path);
    let mut attacks: Vec<(&str, Plant<'_>, &str)> = vec![
        ("mode", &mode, "may be written to by others"),
        ("link", &link, "is a symbolic link"),
        ("invalid", &invalid, "line 1: missing field `command`"),
    ];
    if rustix::process::geteuid().is_root() {
        attacks.push(("owner", &owner, "belongs to user 12345"));
    }
    for (name, write_registration, reason) in attacks {
        let folder = home.folder(name);
        write_registration(&folder);
        let refused = home.command(&["trust", "--yes"]).arg(&folder).output().unwrap();
        let printed = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && printed.contains(reason), "{name}: {refused:?}");
        register(&home, name);
        let off = status(&home, &[name]);
        assert!(off.contains(&format!("commands off: landfall.toml {reason}")), "{off}");
    }
    only_control_runs(&home);
}

fn secrets() {
    let home = Home::new();
    let _daemon = home.daemon();
    let folder = home.folder("a");
    let patch = |key: &str| {
        let channels = json!({"channels": {key: {"v": 1}}});
        json!({"kind": "secrets-patch", "containerName": "a", "patch": channels})
    };
    write(&folder, "[secrets]\nfile = \"own.json\"\nkeys = [\"custom\"]\n");
    register(&home, "a");
    assert_eq!(refused(&home, &patch("custom")), "landfall.toml is not trusted");
    // The names of the reference's channels do not bypass the approval.
    assert_eq!(refused(&home, &patch("slack")), "landfall.toml is not trusted");
    assert!(!folder.join("own.json").exists());
    home.trust(&folder);
    done(&home, &patch("custom"));
    assert!(folder.join("own.json").exists());
    // A file without the table changes nothing about secrets, approved or not.
    write(&folder, &commands(&home, "a"));
    register(&home, "a");
    let mcp = json!({"mcp": {"server": "s", "credential": {}}});
    done(&home, &json!({"kind": "secrets-patch", "containerName": "a", "patch": mcp}));
    assert!(folder.join("secrets.json").exists());
}

fn ports() {
    // Each case has its own network, so the port is free.
    const PORT: u16 = 617;
    let home = Home::new();
    let _daemon = home.daemon();
    let (inside, folder) = (Namespace::new(), home.folder("a"));
    let file = folder.join(".devcontainer.json");
    std::fs::write(&file, json!({"forwardPorts": [PORT, 3000]}).to_string()).unwrap();
    let register = |more: &[&str]| {
        let mut command = home.command(&["register", "a", "--netns", &inside.path(), "--cwd"]);
        command.arg(&folder).args(more).output().unwrap()
    };
    let output = register(&[]);
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(
        printed.contains("ports 617 off: .devcontainer.json is not trusted\nhint: landfall trust "),
        "{printed}"
    );
    let server = Server::listen(&inside, &format!("127.0.0.1:{PORT}"));
    let other = Server::listen(&inside, "127.0.0.1:3000");
    let wait_for_state = |wanted: &str| {
        wait_until(&format!("port {PORT} to be {wanted}"), || {
            let described = done(&home, &json!({"kind": "describe"}));
            let rows = described["containers"][0]["forwards"].as_array().cloned().unwrap_or_default();
            let row = rows.into_iter().find(|row| row["port"] == PORT).unwrap_or_default();
            if row["state"] == wanted { Ok(()) } else { Err((described, home.events())) }
        });
    };
    wait_for_state("denied");
    let client = connect(([127, 0, 0, 1], 3000));
    let kept = other.accept();
    let off =
        format!("ports    617 off: .devcontainer.json is not trusted (landfall trust {})", folder.display());
    assert!(status(&home, &["a"]).contains(&off), "{}", status(&home, &["a"]));
    home.trust(&folder);
    wait_for_state("open");
    drop(connect(([127, 0, 0, 1], PORT)));
    server.accept();
    // A changed file needs a new approval.
    std::fs::write(&file, json!({"forwardPorts": [PORT, 618]}).to_string()).unwrap();
    register(&[]);
    wait_for_state("denied");
    std::fs::write(&file, json!({"forwardPorts": [PORT, 3000]}).to_string()).unwrap();
    register(&[]);
    wait_for_state("open");
    home.command(&["trust", "--revoke"]).arg(&folder).output().unwrap();
    wait_for_state("denied");
    // A port on the command line needs no approval and no question.
    let output = register(&["--allow", "617"]);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    wait_for_state("open");
    drop((client, kept));
}
