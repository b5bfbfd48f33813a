use super::*;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::thread;

use tempfile::TempDir;

/// A daemon that accepts one connection after the other, records each request line, and sends scripted answers.
struct Scripted {
    folder: TempDir,
    requests: std::sync::mpsc::Receiver<String>,
}

impl Scripted {
    fn new(answers: &'static [&'static str]) -> Scripted {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("hostd.sock")).unwrap();
        let (sender, requests) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let mut held = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                sender.send(line).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
                // An empty answer keeps the connection open.
                if answer.is_empty() {
                    held.push(stream);
                }
            }
            // Listen until the end of the test.
            while listener.accept().is_ok() {}
        });
        Scripted { folder, requests }
    }

    fn client(&self) -> Client {
        Client::new(self.folder.path().join("hostd.sock"))
    }
}

#[test]
fn without_a_socket_file_the_daemon_is_absent() {
    let folder = tempfile::tempdir().unwrap();
    let client = Client::new(folder.path().join("hostd.sock"));
    assert!(!client.is_reachable());
    let error = client.ask("list").unwrap_err();
    assert!(error.is_absent());
    assert_eq!(error.to_string(), "No such file or directory (os error 2)", "the error of the system call");
}

#[test]
fn a_stale_socket_means_that_the_daemon_is_absent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostd.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(Client::new(path).ask("list").unwrap_err().is_absent());
}

#[test]
fn a_request_is_sent_unchanged_in_one_line() {
    let daemon = Scripted::new(&["{\"ok\":true}\n"]);
    let request = json!({ "kind": "register", "containerName": "coder", "cwd": "/w/coder" });
    assert_eq!(daemon.client().call(&request).unwrap(), Value::Null);
    let line = daemon.requests.recv().unwrap();
    assert!(line.ends_with('\n') && line.matches('\n').count() == 1);
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), request);
}

#[test]
fn a_daemon_that_answers_list_is_reachable() {
    assert!(Scripted::new(&["{\"ok\":true,\"result\":{\"registrations\":[]}}\n"]).client().is_reachable());
}

#[test]
fn a_daemon_that_never_answers_causes_a_timeout() {
    let daemon = Scripted::new(&[""]);
    let error = daemon.client().within(Duration::from_millis(50)).ask("version").unwrap_err();
    assert_eq!(error.to_string(), "daemon ack timeout after 50ms");
    assert!(!error.is_absent());
}

#[test]
fn bytes_after_the_newline_are_ignored_and_an_invalid_answer_is_an_error() {
    let daemon = Scripted::new(&[
        "{\"ok\":true,\"result\":{\"port\":1}}\n{\"ok\":false}\n",
        "undefined\n",
        "{\"ok\":false,\"reason\":\"not registered: x\"}\n",
        "{\"ok\":\"yes\"}\n",
        "{\"ok\":true,\"result\":1\n",
    ]);
    let ask = || daemon.client().ask("http-info");
    assert_eq!(ask().unwrap(), json!({ "port": 1 }));
    assert_eq!(ask().unwrap_err().to_string(), "invalid response from daemon");
    assert_eq!(ask().unwrap_err().to_string(), "not registered: x");
    assert!(matches!(ask(), Err(CallError::Invalid)));
    assert!(matches!(ask(), Err(CallError::Invalid)));
}

#[test]
fn an_answer_without_a_newline_is_an_error() {
    let daemon = Scripted::new(&["{\"ok\":true}"]);
    assert!(matches!(daemon.client().ask("list"), Err(CallError::Ended)));
}

#[test]
fn a_line_without_a_newline_is_bounded() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let flood = thread::spawn(move || while theirs.write_all(&[b'x'; 4096]).is_ok() {});
    let mut lines = Lines { stream: ours, buffer: Vec::new(), bytes_max: 100_000 };
    assert!(matches!(lines.line(None), Err(CallError::Invalid)));
    assert!(lines.buffer.len() <= 100_000 + CHUNK_BYTES);
    drop(lines);
    flood.join().unwrap();
}

#[test]
fn a_partial_line_survives_a_deadline() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut lines = Lines { stream: ours, buffer: Vec::new(), bytes_max: 100 };
    theirs.write_all(b"on").unwrap();
    let soon = Instant::now() + Duration::from_millis(20);
    assert!(matches!(lines.line(Some(soon)), Err(CallError::Timeout(_))));
    theirs.write_all(b"e\ntwo\nthr").unwrap();
    drop(theirs);
    assert_eq!(lines.line(None).unwrap(), b"one");
    assert_eq!(lines.line(None).unwrap(), b"two");
    assert!(matches!(lines.line(None), Err(CallError::Ended)));
}

#[test]
fn a_subscription_names_its_container() {
    let daemon = Scripted::new(&["{\"ok\":true}\n{\"kind\":\"register\"}\n", "{\"ok\":true}\n"]);
    let mut lines = daemon.client().events(Some("coder")).unwrap();
    assert_eq!(lines.line(None).unwrap(), b"{\"kind\":\"register\"}");
    daemon.client().events(None).unwrap();
    let parsed = |line: String| serde_json::from_str::<Value>(&line).unwrap();
    assert_eq!(
        parsed(daemon.requests.recv().unwrap()),
        json!({ "kind": "events", "containerName": "coder" })
    );
    assert_eq!(parsed(daemon.requests.recv().unwrap()), json!({ "kind": "events" }));
}
