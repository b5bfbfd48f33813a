//! Claim 30 at the command line: the output and the questions of the verbs, and that the shown content is the approved
//! content.

use std::process::Command;

use landfall_tests::case::Case;
use landfall_tests::rpc::register;
use landfall_tests::terminal::Terminal;
use landfall_tests::{FakeDocker, Home, wait_until};
use serde_json::{Value, json};

use crate::trust::{commands, lines, only_control_runs, status, wait_for_line, write};

pub(crate) const CASES: &[Case] = &[
    Case::once("c30_start_register_and_attach_of_a_cloned_folder_run_no_command", verbs),
    Case::once("c30_the_content_that_was_shown_is_the_content_that_is_approved", swapped),
    Case::once("c30_a_new_user_answers_one_question", one_question),
    Case::once("c30_trust_shows_every_command_and_hides_none", shown),
    Case::once("c30_an_approval_survives_a_full_disk_and_unknown_fields", list_is_kept),
    Case::once("c21_an_approval_killed_at_any_step_is_stored_completely_or_not_at_all", killed_at_any_step),
    Case::once("c30_a_folder_that_holds_the_approvals_cannot_be_trusted", home_inside),
];

fn verbs() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    for name in ["started", "registered", "attached"] {
        write(&home.folder(name), &commands(&home, name));
    }
    // A container that does not run is attached at once, without a wait.
    docker.add("attached", false);
    let verbs: [(&str, &[&str]); 3] = [
        ("started", &["start", "--image", "busybox"]),
        ("registered", &["register", "registered", "--cwd"]),
        ("attached", &["attach", "attached", "--cwd"]),
    ];
    for (name, verb) in verbs {
        let folder = home.folder(name);
        let output = home.command(verb).arg(&folder).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        let note = format!(
            "note     commands off: landfall.toml is not trusted\nhint: landfall trust {}\n",
            folder.display()
        );
        assert!(printed.contains(&note), "{name}: {output:?}");
        assert!(home.registered(name).is_some(), "it is registered all the same: {output:?}");
        let json = home.command(verb).arg(&folder).arg("--json").output().unwrap();
        let line = String::from_utf8_lossy(&json.stderr).lines().next().unwrap_or_default().to_owned();
        // A second start is refused before the question.
        assert!(name == "started" || line.starts_with("{\"event\":\"note\""), "{json:?}");
    }
    only_control_runs(&home);
    for (name, _) in verbs {
        assert!(status(&home, &[name]).contains("commands off: landfall.toml is not trusted"));
        home.trust(&home.folder(name));
        wait_for_line(&home, &format!("{name} job"), 1);
    }
}

fn swapped() {
    let home = Home::new();
    let _daemon = home.daemon();
    let folder = home.folder("a");
    let shown = commands(&home, "shown");
    write(&folder, &shown);
    let mut command = home.command(&["trust"]);
    command.arg(&folder);
    let mut terminal = Terminal::run(command);
    terminal.wait_for("[y/N]");
    write(&folder, &commands(&home, "evil"));
    terminal.type_line("y");
    let (status, text) = terminal.end();
    assert!(status.success() && text.contains("echo shown job"), "{text}");
    register(&home, "a");
    only_control_runs(&home);
    let show = home.command(&["trust", "--show", "--json"]).arg(&folder).output().unwrap();
    let show: Value = serde_json::from_slice(&show.stdout).unwrap();
    assert_eq!((&show["trusted"], &show["files"][0]["changed"]), (&json!(false), &json!(true)), "{show}");
    write(&folder, &shown);
    register(&home, "a");
    wait_for_line(&home, "shown job", 1);
}

fn one_question() {
    let home = Home::new();
    let _daemon = home.daemon();
    let folder = home.folder("a");
    write(&folder, &commands(&home, "a"));
    std::fs::write(folder.join(".devcontainer.json"), json!({"forwardPorts": [80]}).to_string()).unwrap();
    let answered = |answer: &str| {
        let mut command = home.command(&["register", "a", "--cwd"]);
        command.arg(&folder);
        let mut terminal = Terminal::run(command);
        terminal.wait_for("[y/N]");
        terminal.type_line(answer);
        let (status, text) = terminal.end();
        assert!(status.success() && text.contains("a is registered"), "{text}");
        assert_eq!(text.matches("[y/N]").count(), 1, "{text}");
        assert!(text.contains("echo a job") && text.contains("80 answer on localhost"), "{text}");
        text
    };
    for no in ["", "n", "yess", "Y E S"] {
        assert!(answered(no).contains("commands off"), "{no}");
    }
    only_control_runs(&home);
    assert!(!answered("y").contains("commands off"));
    wait_for_line(&home, "a job", 1);
    assert!(!status(&home, &["a"]).contains("trust"));
    // Asked once: a trusted folder is registered without a message, with and without a terminal.
    let again = home.command(&["register", "a", "--cwd"]).arg(&folder).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&again.stderr), "");
    let mut command = home.command(&["register", "a", "--cwd"]);
    command.arg(&folder);
    let (_, text) = Terminal::run(command).end();
    assert!(!text.contains("[y/N]"), "{text}");
    // Without a terminal, `trust` refuses.
    write(&folder, &commands(&home, "b"));
    let silent = home.command(&["trust"]).arg(&folder).output().unwrap();
    assert_eq!(silent.status.code(), Some(6), "{silent:?}");
    assert!(String::from_utf8_lossy(&silent.stderr).contains("landfall trust --yes "), "{silent:?}");
}

fn shown() {
    let home = Home::new();
    let folder = home.folder("a");
    let text = concat!(
        "trust-folder = true\n[jobs.renew]\ncommand = [\"renew\\u001b[2K\\r\\u202e\", \"a b\"]\nevery = \"90s\"\n",
        "[secrets]\nkeys = [\"kakaotalk\"]\n[tools]\nwants = [\"claude\"]\n",
    );
    write(&folder, text);
    std::fs::create_dir(folder.join(".devcontainer")).unwrap();
    let printed = json!({"forwardPorts": [443, 3000], "initializeCommand": "touch /tmp/never"});
    std::fs::write(folder.join(".devcontainer/devcontainer.json"), printed.to_string()).unwrap();
    let output = home.command(&["trust", "--show"]).arg(&folder).output().unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    // No argument of a command can move the cursor or hide text.
    assert!(!shown.contains('\u{1b}') && !shown.contains('\r') && !shown.contains('\u{202e}'), "{shown:?}");
    for part in [
        "command  renew, every 1m 30s, at most 5m: 'renew\\u{1b}[2K\\r\\u{202e}' 'a b'\n",
        "command  trust-folder = true: commands may be programs of the folder itself\n",
        "secrets  the container may replace in secrets.json: kakaotalk\n",
        "tools    requests claude",
        "ports    443 answer on localhost\n",
        "trust    landfall.toml is not trusted\n",
        "trust    .devcontainer/devcontainer.json is not trusted\n",
    ] {
        assert!(shown.contains(part), "{part:?} in {shown}");
    }
    assert!(!home.path().join("trust.json").exists(), "--show changes nothing");
    let _daemon = home.daemon();
    let output = home.command(&["register", "a", "--cwd"]).arg(&folder).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(printed.contains("devcontainer.json: initializeCommand"), "{printed}");
    let list = || -> Value {
        let output = home.run(&["trust", "--list", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert_eq!(list(), json!({"trusted": []}));
    home.trust(&folder);
    let trusted = list();
    let files: Vec<&Value> = trusted["trusted"].as_array().unwrap().iter().collect();
    assert_eq!(files.len(), 2, "{trusted}");
    assert!(files.iter().all(|file| file["folder"] == json!(folder) && file["now"] == "as approved"));
    write(&folder, "");
    assert!(String::from_utf8_lossy(&home.run(&["trust", "--list"]).stdout).contains("changed"));
}

fn list_is_kept() {
    let home = Home::new();
    let folders = ["a", "b", "c"].map(|name| {
        write(&home.folder(name), &commands(&home, name));
        home.folder(name)
    });
    home.trust(&folders[0]);
    let path = home.path().join("trust.json");
    let mut list: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    list["later"] = json!({"n": 1});
    list["folders"][folders[0].to_str().unwrap()]["reach"] = json!([5432]);
    std::fs::write(&path, list.to_string()).unwrap();
    home.trust(&folders[1]);
    let now: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(now["later"], list["later"]);
    let first = folders[0].to_str().unwrap();
    assert_eq!(now["folders"][first], list["folders"][first]);
    // A full disk of 64 KiB: the next approval fails, and the earlier ones are kept.
    let script = "mount -t tmpfs -o size=64k,mode=700 none \"$LANDFALL_HOME\" || exit 99
        \"$1\" trust --yes \"$2\" >/dev/null || exit 98
        head -c 1000000 /dev/zero > \"$LANDFALL_HOME/fill\"
        \"$1\" trust --yes \"$3\" >/dev/null && exit 97
        \"$1\" trust --list --json";
    let mut full = Command::new("unshare");
    full.args(["--map-root-user", "--mount", "sh", "-c", script, "sh"]).arg(Home::program());
    full.args([&folders[1], &folders[2]]).env("LANDFALL_HOME", home.path());
    let output = full.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && printed.contains("No space left on device"), "{output:?}");
    let kept: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(kept["trusted"].as_array().unwrap().len(), 1, "{kept}");
    assert_eq!(kept["trusted"][0]["folder"], json!(folders[1]));
}

fn home_inside() {
    let home = Home::new();
    let folder = home.path().parent().unwrap().to_owned();
    let _daemon = home.daemon();
    write(&folder, &commands(&home, "inside"));
    let refused = home.command(&["trust", "--yes"]).arg(&folder).output().unwrap();
    assert_eq!(refused.status.code(), Some(6), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("inside the folder"), "{refused:?}");
    // A container that writes the approval itself gets no approval.
    let digest = Command::new("sha256sum").arg(folder.join("landfall.toml")).output().unwrap();
    let digest = String::from_utf8_lossy(&digest.stdout)[..64].to_owned();
    let forged = json!({"formatVersion": 1, "folders": {folder.to_str().unwrap(): {"files": {"landfall.toml": {"sha256": digest}}}}});
    std::fs::write(home.path().join("trust.json"), forged.to_string()).unwrap();
    let request = json!({"kind": "register", "containerName": "inside", "cwd": folder});
    assert_eq!(landfall_tests::rpc::ask(&home, &request), json!({"ok": true}));
    wait_until("the reason to be shown", || {
        let off = status(&home, &["inside"]);
        if off.contains("commands off: landfall.toml cannot be trusted: ") { Ok(()) } else { Err(off) }
    });
    only_control_runs(&home);
    assert!(lines(&home).iter().all(|line| line.starts_with("control ")));
}

/// The calls with which an approval changes the disk, besides `write`.
const CALLS: [&str; 5] = ["openat", "fchmod", "fsync", "renameat", "flock"];

fn killed_at_any_step() {
    let home = Home::new();
    let folders = ["a", "b"].map(|name| {
        write(&home.folder(name), &commands(&home, name));
        home.folder(name)
    });
    home.trust(&folders[0]);
    let path = home.path().join("trust.json");
    let before = std::fs::read(&path).unwrap();
    let count = || -> usize {
        let listed = home.run(&["trust", "--list", "--json"]);
        let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
        listed["trusted"].as_array().unwrap().len()
    };
    let mut kills = 0;
    for call in CALLS {
        for nth in 1.. {
            let verb = home.command(&["trust", "--yes"]);
            let mut killed = Command::new("strace");
            // Only calls below the home, because the start of a process opens many files.
            killed.args(["-f", "-qq", "-o", "/dev/null", "-P"]).arg(home.path());
            killed.arg("-P").arg(&path).arg("-P").arg(path.with_extension("json.tmp"));
            killed.arg("-P").arg(home.path().join("run"));
            killed.args(["-e", &format!("trace={call}")]);
            killed.args(["-e", &format!("inject={call}:signal=KILL:when={nth}")]);
            killed.arg(verb.get_program()).args(verb.get_args()).arg(&folders[1]);
            for (name, value) in verb.get_envs() {
                match value {
                    Some(value) => killed.env(name, value),
                    None => killed.env_remove(name),
                };
            }
            let output = killed.output().unwrap();
            let now = std::fs::read(&path).unwrap();
            if output.status.success() {
                assert_eq!(count(), 2);
                std::fs::write(&path, &before).unwrap();
                break;
            }
            kills += 1;
            assert!(now == before || count() == 2, "{call} {nth}: {}", String::from_utf8_lossy(&now));
            std::fs::write(&path, &before).unwrap();
        }
    }
    assert!(kills >= CALLS.len(), "only {kills} steps");
    home.trust(&folders[1]);
    assert_eq!(home.mode("trust.json"), 0o600);
    assert!(!path.with_extension("json.tmp").exists());
}
