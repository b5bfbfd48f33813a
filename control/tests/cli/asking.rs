//! The verbs that send requests to the daemon, against a scripted daemon: their requests, output and exit codes.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue reports the line")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};

use landfall::sys::paths::Home;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{landfall, stderr, stdout};

/// A home in a temporary directory.
pub(crate) struct Place {
    _folder: TempDir,
    pub(crate) home: Home,
}

impl Place {
    pub(crate) fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path().join("home")).unwrap();
        home.ensure_directories().unwrap();
        Place { _folder: folder, home }
    }

    pub(crate) fn landfall(&self, arguments: &[&str]) -> Command {
        let mut command = landfall();
        command.env("LANDFALL_HOME", self.home.root()).env("TZ", "UTC").args(arguments).stdin(Stdio::null());
        command
    }

    pub(crate) fn output(&self, arguments: &[&str]) -> Output {
        self.landfall(arguments).output().unwrap()
    }

    /// Returns everything that the program printed, with the exit code and without text that differs between runs.
    pub(crate) fn seen(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let code = output.status.code().unwrap_or(-1);
        let text = format!("{}{}exit {code}", stdout(&output), stderr(&output));
        text.replace(&self.home.root().display().to_string(), "HOME").replace(&version(), "BUILD")
    }
}

fn version() -> String {
    landfall::version::FINGERPRINT.to_owned()
}

/// A daemon with scripted answers, which records its requests.
pub(crate) struct Scripted {
    pub(crate) place: Place,
    asked: Receiver<Value>,
}

impl Scripted {
    pub(crate) fn new(mut answer: impl FnMut(&Value, &mut UnixStream) -> Value + Send + 'static) -> Scripted {
        let place = Place::new();
        let listener = UnixListener::bind(place.home.socket()).unwrap();
        let (requests, asked) = mpsc::channel();
        std::thread::spawn(move || {
            // Connections of event subscribers stay open.
            let mut open = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                let request: Value = serde_json::from_str(&line).unwrap();
                let answer = answer(&request, &mut stream);
                let _ = stream.write_all(format!("{answer}\n").as_bytes());
                if request["kind"] == "events" {
                    open.push(stream);
                }
                if requests.send(request).is_err() {
                    return;
                }
            }
        });
        Scripted { place, asked }
    }

    /// Returns a daemon of this build, with these containers.
    fn current(containers: Value) -> Scripted {
        Scripted::new(move |request, _| ours(request, &containers))
    }

    pub(crate) fn asked(&self, kind: &str) -> Value {
        loop {
            let request = self.asked.recv_timeout(crate::support::WAIT_MAX).unwrap();
            if request["kind"] == kind {
                return request;
            }
        }
    }
}

pub(crate) fn ours(request: &Value, containers: &Value) -> Value {
    let result = match request["kind"].as_str().unwrap() {
        "version" => json!({ "version": version() }),
        "http-info" => json!({ "port": 8974 }),
        "list" => json!({ "registrations": [] }),
        "status" if request["containerName"] == "shop" => {
            json!({ "containerName": "shop", "cwd": "/w/shop", "forwardedPorts": [5173, "x", 3000] })
        }
        "status" => {
            let reason = format!("not registered: {}", request["containerName"].as_str().unwrap());
            return json!({ "ok": false, "reason": reason });
        }
        "describe" => json!({
            "version": version(), "pid": 42, "home": "/home/a/.landfall", "httpPort": 8974, "replayed": true,
            "engine": { "version": version(), "ring": "epoll", "reason": "io_uring is forbidden (sysctl)", "pid": 43,
                        "draining": 1 },
            "containers": containers,
        }),
        _ => return json!({ "ok": true }),
    };
    json!({ "ok": true, "result": result })
}

fn containers() -> Value {
    json!([
        { "containerName": "shop", "cwd": "/w/shop", "way": "process 42", "state": "reached", "forwards": [
            { "port": 3000, "hostPort": 3000, "state": "open", "process": "node", "pid": 77, "connections": 2,
              "accepted": 9, "bytesUp": 1000, "bytesDown": 1_500_000 },
            { "port": 5432, "hostPort": 5432, "state": "failed", "reason": "EADDRINUSE: coder has it",
              "process": "post\u{1b}[2Jgres", "connections": 0, "accepted": 0, "bytesUp": 0, "bytesDown": 0 },
        ] },
        { "containerName": "coder", "cwd": "/w/coder", "way": "docker", "state": "unreachable",
          "reason": "it does not run", "forwards": [], "withheld": [
            { "folder": "/w/coder", "file": "landfall.toml", "reason": "is not trusted", "needsTrust": true },
            { "folder": "/w/coder", "file": ".devcontainer.json", "reason": "is not trusted", "needsTrust": true,
              "ports": [80, 443] },
        ] },
    ])
}

#[test]
fn without_a_daemon_every_verb_reports_that_and_starts_none() {
    let place = Place::new();
    let all = [
        &["status"][..],
        &["status", "shop"],
        &["status", "--json"],
        &["ls"],
        &["deregister", "shop"],
        &["events"],
        &["logs"],
        &["down"],
        &["down", "--json"],
        &["version"],
        &["version", "--json"],
    ];
    let seen: Vec<String> =
        all.iter().map(|verb| format!("$ landfall {}\n{}\n", verb.join(" "), place.seen(verb))).collect();
    insta::assert_snapshot!("no_daemon", seen.join("\n"));
    assert!(!place.home.socket().exists() && !place.home.pid_file().exists());
}

#[test]
fn status_shows_the_daemon_its_engine_and_its_containers() {
    let daemon = Scripted::current(containers());
    let all = [
        &["status"][..],
        &["status", "shop"],
        &["ls"],
        &["version"],
        &["up"],
        &["up", "--http-port", "9000"],
    ];
    let seen: Vec<String> = all
        .iter()
        .map(|verb| format!("$ landfall {}\n{}\n", verb.join(" "), daemon.place.seen(verb)))
        .collect();
    insta::assert_snapshot!("daemon_shown", seen.join("\n"));
}

#[test]
fn json_is_one_object_with_the_names_of_the_wire() {
    let daemon = Scripted::current(containers());
    for verb in [&["status"][..], &["status", "shop"], &["ls"], &["version"], &["up"]] {
        let output = daemon.place.output(&[verb, &["--json"]].concat());
        let value: Value = serde_json::from_str(stdout(&output).trim()).unwrap();
        assert_eq!(stdout(&output).lines().count(), 1);
        insta::assert_snapshot!(
            format!("json_{}", verb.join("_")),
            serde_json::to_string_pretty(&value).unwrap().replace(&version(), "BUILD")
        );
    }
}

/// Returns the request with which `attach` registers a Docker container whose labels are reported as `said`.
fn attached(said: &Value, folder: &str, options: &[&str]) -> Value {
    let mut found = json!({ "name": "shop", "id": "1", "image": "x", "running": true, "forwarded": "no" });
    found.as_object_mut().unwrap().extend(said.as_object().unwrap().clone());
    let shop = json!([{ "containerName": "shop", "state": "off", "forwards": [] }]);
    let daemon = Scripted::new(move |request, _| match request["kind"].as_str().unwrap() {
        "containers" => json!({ "ok": true, "result": { "containers": [found] } }),
        _ => ours(request, &shop),
    });
    let path = daemon.place.home.root().join("shop");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join(".devcontainer.json"), folder).unwrap();
    let output =
        daemon.place.output(&[&["attach", "shop", "--cwd", path.to_str().unwrap()], options].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    daemon.asked("register")
}

#[test]
fn the_folders_file_overrides_the_metadata_of_the_image() {
    let said = json!({ "devcontainer": {
        "otherPortsAttributes": { "onAutoForward": "ignore" },
        "portsAttributes": { "3000": { "label": "image", "onAutoForward": "ignore" }, "9229": { "label": "debug" } },
    } });
    let folder = r#"{ "forwardPorts": [80], "portsAttributes": { "3000": { "label": "folder" }, } } // mine"#;
    let request = attached(&said, folder, &[]);
    assert_eq!(request["portForward"], json!({ "allow": [3000, 9229] }));
    // A port below 1024 that the folder's file names needs an approval of that file.
    assert_eq!(request["folderPorts"]["privileged"], json!([80]));
    assert_eq!(request["folderPorts"]["file"], ".devcontainer.json");
    let labels: Vec<&Value> =
        request["portNotes"].as_array().unwrap().iter().map(|note| &note["label"]).collect();
    assert_eq!(labels, ["folder", "debug"]);

    // The container's own labels replace both, and options replace those; the notes about ports are kept.
    let mut of_labels = said.clone();
    of_labels["portForward"] = json!({ "allow": [9229] });
    let replaced = attached(&of_labels, folder, &[]);
    assert_eq!(replaced["portForward"], json!({ "allow": [9229] }));
    assert_eq!(replaced["portNotes"], request["portNotes"]);
    let replaced = attached(&of_labels, folder, &["--allow", "5000"]);
    assert_eq!(replaced["portForward"], json!({ "allow": [5000] }));
}

#[test]
fn ls_without_registrations_prints_a_note_instead_of_a_table() {
    insta::assert_snapshot!(Scripted::current(json!([])).place.seen(&["ls"]));
}

#[test]
fn an_unknown_name_is_reported_with_a_hint() {
    let daemon = Scripted::current(json!([]));
    insta::assert_snapshot!(daemon.place.seen(&["status", "nobody"]));
    insta::assert_snapshot!(daemon.place.seen(&["deregister", "nobody"]));
}

#[test]
fn a_reference_daemon_is_shown_without_missing_details() {
    let daemon = Scripted::new(|request, stream| match request["kind"].as_str().unwrap() {
        "describe" | "events" => {
            let _ = stream.write_all(b"undefined\n");
            Value::Null
        }
        "version" => json!({ "ok": true, "result": { "version": "theirs" } }),
        "list" => {
            let registrations = json!([{ "containerName": "shop", "cwd": "/w/shop" }]);
            json!({ "ok": true, "result": { "registrations": registrations } })
        }
        _ => ours(request, &Value::Null),
    });
    let all = [&["status"][..], &["status", "shop"], &["ls"], &["events"], &["version"]];
    let seen: Vec<String> = all
        .iter()
        .map(|verb| format!("$ landfall {}\n{}\n", verb.join(" "), daemon.place.seen(verb)))
        .collect();
    insta::assert_snapshot!("reference_daemon", seen.join("\n"));
}

#[test]
fn an_answer_to_status_without_a_folder_is_rejected() {
    let daemon = Scripted::new(|_, _| json!({ "ok": true, "result": { "containerName": "shop" } }));
    insta::assert_snapshot!(daemon.place.seen(&["status", "shop"]));
}

#[test]
fn register_sends_its_arguments_and_tokens() {
    let daemon = Scripted::current(json!([]));
    let folder = tempfile::tempdir().unwrap();
    let cwd = folder.path().to_str().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "canary-restart\n").unwrap();
    let arguments = [
        "register",
        "shop",
        "--cwd",
        cwd,
        "--docker",
        "--allow",
        "80,*",
        "--deny",
        "9229",
        "--ws-host-port",
        "40001",
        "--restart-token-file",
        file.to_str().unwrap(),
    ];
    let output =
        daemon.place.landfall(&arguments).env("LANDFALL_BROKER_TOKEN", "canary-broker").output().unwrap();
    assert_eq!(stdout(&output), "register shop is registered\n");
    assert_eq!(
        daemon.asked("register"),
        json!({
            "kind": "register", "containerName": "shop", "cwd": cwd, "way": { "kind": "docker" },
            "portForward": { "allow": "*", "deny": [9229], "privileged": [80] }, "wsHostPort": 40001,
            "restartToken": "canary-restart", "brokerToken": "canary-broker",
        })
    );
}

#[test]
fn register_with_a_pid_sends_its_start_time() {
    let daemon = Scripted::current(json!([]));
    let pid = std::process::id();
    let output = daemon.place.output(&["register", "me", "--pid", &pid.to_string(), "--json"]);
    assert_eq!(stdout(&output), "{\"registered\":\"me\"}\n", "{}", stderr(&output));
    let attach_method = &daemon.asked("register")["way"];
    assert_eq!((&attach_method["kind"], &attach_method["pid"]), (&json!("process"), &json!(pid)));
    assert!(attach_method["started"]["ticks"].is_u64() && attach_method["started"]["boot"].is_string());
}

#[test]
fn register_with_an_agent_sends_its_directory() {
    let daemon = Scripted::current(json!([]));
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().to_str().unwrap();
    let output = daemon.place.output(&["register", "shop", "--agent", directory]);
    assert_eq!(stdout(&output), "register shop is registered\n", "{}", stderr(&output));
    let asked = daemon.asked("register");
    assert_eq!(asked["way"], json!({ "kind": "agent", "directory": directory }));
    assert_eq!(asked.get("portForward"), None);
}

#[test]
fn register_with_a_websocket_sends_port_token_and_policy() {
    let daemon = Scripted::current(json!([]));
    let arguments = ["register", "far", "--websocket", "--ws-host-port", "40001"];
    let output = daemon.place.landfall(&arguments).env("LANDFALL_BROKER_TOKEN", "canary").output().unwrap();
    assert_eq!(stdout(&output), "register far is registered\n", "{}", stderr(&output));
    let asked = daemon.asked("register");
    assert_eq!(asked["way"], json!({ "kind": "websocket" }));
    assert_eq!((&asked["wsHostPort"], &asked["brokerToken"]), (&json!(40001), &json!("canary")));
    assert_eq!(asked["portForward"], json!({ "allow": "*" }));
}

#[test]
fn invalid_arguments_are_refused_before_the_daemon_is_called() {
    let place = Place::new();
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    std::fs::write(&empty, "\n").unwrap();
    let empty = empty.to_str().unwrap();
    let all = [
        &["register"][..],
        &["register", "../x"],
        &["register", "x", "--pid", "4194305"],
        &["register", "x", "--pid", "1", "--docker"],
        &["register", "x", "--netns", "/run/netns/no-such-namespace"],
        &["register", "x", "--agent", "/no/such/folder"],
        &["register", "x", "--agent", empty],
        &["register", "x", "--websocket"],
        &["register", "x", "--websocket", "--docker"],
        &["register", "x", "--cwd", "/no/such/folder"],
        &["register", "x", "--ws-host-port", "0"],
        &["register", "x", "--restart-token-file", "/no/such/file"],
        &["register", "x", "--restart-token-file", empty],
        &["register", "x", "--restart-token", "secret"],
        &["restart"],
        &["restart", "x", "--wait", "5", "--no-wait"],
        &["up", "--http-bind", "everywhere"],
    ];
    let seen: Vec<String> = all
        .iter()
        .map(|verb| format!("$ landfall {}\n{}\n", verb.join(" "), place.seen(verb)).replace(empty, "EMPTY"))
        .collect();
    insta::assert_snapshot!("daemon_usage_errors", seen.join("\n"));
    assert!(!place.home.socket().exists() && !place.home.pid_file().exists(), "no daemon was started");
}

#[test]
fn a_refusal_is_printed_with_the_daemons_reason() {
    let daemon = Scripted::new(|request, _| match request["kind"].as_str().unwrap() {
        "register" | "restart" => json!({ "ok": false, "reason": "daemon stopping" }),
        _ => ours(request, &json!([])),
    });
    insta::assert_snapshot!(daemon.place.seen(&["register", "shop", "--docker"]));
    insta::assert_snapshot!(daemon.place.seen(&["restart", "shop"]));
}

/// Returns a daemon that sends these events after a request to restart.
fn restarting(events: &'static [&'static str]) -> Scripted {
    let mut listener: Option<UnixStream> = None;
    Scripted::new(move |request, stream| match request["kind"].as_str().unwrap() {
        "events" => {
            listener = Some(stream.try_clone().unwrap());
            json!({ "ok": true })
        }
        "restart" => {
            if let Some(mut listener) = listener.take() {
                for event in events {
                    writeln!(listener, "{event}").unwrap();
                }
                if events.is_empty() {
                    listener.shutdown(std::net::Shutdown::Both).unwrap();
                }
            }
            json!({ "ok": true, "result": { "containerName": "shop", "scheduled": true } })
        }
        _ => ours(request, &json!([])),
    })
}

#[test]
fn a_restart_is_waited_for_and_its_outcome_is_the_exit_code() {
    let back = restarting(&[
        r#"{"time":"2026-01-02T03:04:05.678Z","kind":"restart-scheduled","containerName":"shop","build":true}"#,
        r#"{"time":"2026-01-02T03:04:05.678Z","kind":"restart-failed","containerName":"other","reason":"no"}"#,
        r#"{"time":"2026-01-02T03:04:05.678Z","kind":"restart-completed","containerName":"shop"}"#,
    ]);
    insta::assert_snapshot!(back.place.seen(&["restart", "shop", "--build"]));
    assert_eq!(back.asked("events")["containerName"], "shop");
    assert_eq!(back.asked("restart"), json!({ "kind": "restart", "containerName": "shop", "build": true }));
    let failed =
        restarting(&[r#"{"kind":"restart-failed","containerName":"shop","reason":"stop failed: no"}"#]);
    insta::assert_snapshot!(failed.place.seen(&["restart", "shop"]));
    insta::assert_snapshot!(restarting(&[]).place.seen(&["restart", "shop"]));
    let quiet = restarting(&[r#"{"kind":"restart-scheduled","containerName":"shop","build":false}"#]);
    insta::assert_snapshot!(quiet.place.seen(&["restart", "shop", "--wait", "0"]));
    insta::assert_snapshot!(restarting(&[]).place.seen(&["restart", "shop", "--no-wait"]));
}

#[test]
fn events_are_sentences_or_unchanged_lines() {
    const LINES: [&str; 2] = [
        r#"{"time":"2026-01-02T03:04:05.678Z","kind":"register","containerName":"shop"}"#,
        r#"{"time":"2026-01-02T03:04:06.000Z","kind":"port-forward-event","event":{"kind":"port-forward-opened","containerName":"shop","port":3000,"hostPort":3000,"bindAddr":"127.0.0.1"}}"#,
    ];
    let daemon = || {
        Scripted::new(|_, stream| {
            let _ = stream.write_all(format!("{{\"ok\":true}}\n{}\n{}\n", LINES[0], LINES[1]).as_bytes());
            stream.shutdown(std::net::Shutdown::Both).unwrap();
            Value::Null
        })
    };
    insta::assert_snapshot!(daemon().place.seen(&["events", "--container", "shop"]));
    let output = daemon().place.output(&["events", "--json"]);
    assert_eq!(stdout(&output), format!("{}\n{}\n", LINES[0], LINES[1]));
}

#[test]
fn logs_work_without_a_daemon() {
    let place = Place::new();
    let line = |number: u32| {
        format!(
            "{{\"time\":\"2026-01-02T03:04:0{number}.000Z\",\"kind\":\"notice\",\"text\":\"line {number}\"}}\n"
        )
    };
    let log = place.home.daemon_log();
    std::fs::write(log.with_extension("log.1"), [line(1), line(2)].concat()).unwrap();
    std::fs::write(&log, [line(3), "thread 'main' panicked\n".to_owned()].concat()).unwrap();
    insta::assert_snapshot!(place.seen(&["logs", "-n", "3"]));
    assert_eq!(stdout(&place.output(&["logs", "--json", "-n", "2"])), line(3) + "thread 'main' panicked\n");
}

#[test]
fn a_log_is_followed_across_its_rotation() {
    let place = Place::new();
    let log = place.home.daemon_log();
    std::fs::write(&log, "one\n").unwrap();
    let mut following = crate::support::Running::start(place.landfall(&["logs", "-f"]));
    following.out("one");
    std::fs::rename(&log, log.with_extension("log.1")).unwrap();
    std::fs::write(&log, "two\n").unwrap();
    following.out("two");
}

/// Listens at a path until its standard input ends.
const LISTEN: &str = "
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print('listening', flush=True)
server.settimeout(20)
client, _ = server.accept()
print('heard', client.recv(100), flush=True)";

#[test]
fn a_socket_of_another_user_receives_no_request() {
    let Some(nobody) = crate::support::Nobody::new() else { return };
    let folder = tempfile::Builder::new().prefix("landfall-stolen").tempdir().unwrap();
    let home = Home::at(folder.path().to_owned()).unwrap();
    home.ensure_directories().unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::set_permissions(home.run(), open).unwrap();
    let mut other_user = Command::new("setpriv");
    other_user.args(["--reuid=1", "--regid=1", "--clear-groups", "/usr/bin/env", "python3", "-c", LISTEN]);
    other_user.arg(home.socket());
    let mut other_user = crate::support::Running::start(other_user);
    other_user.out("listening");
    std::fs::set_permissions(home.socket(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let output = nobody.landfall().env("LANDFALL_HOME", home.root()).args(["status"]).output().unwrap();
    assert_eq!(
        stderr(&output),
        "error: the daemon's socket belongs to uid 1\n\
         hint: no request was sent to it; check who owns the run directory of the home\n"
    );
    assert_eq!(output.status.code(), Some(4));
    other_user.out("heard b''");
}

#[test]
fn an_invalid_home_is_reported() {
    let mut seen = Vec::new();
    for home in ["relative", &format!("/{}", "x".repeat(120)), "/dev/null/home"] {
        let output = landfall().env("LANDFALL_HOME", home).arg("up").stdin(Stdio::null()).output().unwrap();
        seen.push(format!("{}exit {}", stderr(&output), output.status.code().unwrap()));
    }
    let output = landfall().arg("status").stdin(Stdio::null()).output().unwrap();
    seen.push(format!("{}exit {}", stderr(&output), output.status.code().unwrap()));
    insta::assert_snapshot!("bad_homes", seen.join("\n"));
}
