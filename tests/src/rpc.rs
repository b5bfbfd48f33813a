//! A client of the daemon's socket that implements only the wire protocol: it sends exact bytes and reads exact bytes.

use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::peer::Peer;
use crate::{Home, TIMEOUT};

/// A connection to the daemon's socket.
pub type Wire = Peer<UnixStream>;

impl Wire {
    /// Connects to the daemon.
    ///
    /// # Panics
    /// If no daemon listens.
    #[track_caller]
    pub fn connect(home: &Home) -> Wire {
        Wire::try_connect(home)
            .unwrap_or_else(|error| panic!("connect: {error}; output of the daemon:\n{}", home.stderr()))
    }

    /// Connects if a daemon listens.
    ///
    /// # Errors
    /// Those of `connect(2)`.
    pub fn try_connect(home: &Home) -> std::io::Result<Wire> {
        Peer::new(UnixStream::connect(home.socket())?)
    }

    /// Shuts down the sending direction.
    ///
    /// # Panics
    /// If the connection is broken.
    pub fn finish(&mut self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// Returns everything up to the end of the connection; a reset counts as the end.
    ///
    /// # Panics
    /// If the connection does not end.
    #[track_caller]
    pub fn rest(&mut self) -> String {
        while self.read_more() {}
        String::from_utf8(std::mem::take(&mut self.unread)).unwrap()
    }

    /// Returns one line without its newline.
    ///
    /// # Panics
    /// If none arrives.
    #[track_caller]
    pub fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            match self.stream.read(&mut byte) {
                Ok(0) => panic!("the end after {:?}", String::from_utf8_lossy(&line)),
                Ok(_) if byte[0] == b'\n' => return String::from_utf8(line).unwrap(),
                Ok(_) => line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&line)),
            }
        }
    }

    /// Returns whether no byte can be read for this long.
    ///
    /// # Panics
    /// If the connection fails.
    pub fn is_silent_for(&mut self, time: Duration) -> bool {
        self.stream.set_read_timeout(Some(time)).unwrap();
        let mut byte = [0];
        let silent = matches!(self.stream.read(&mut byte), Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
        self.stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        silent
    }

    /// Returns the only answer: one line of JSON that follows the wire specification, then the end.
    ///
    /// # Panics
    /// If the daemon sends anything else.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        let text = self.rest();
        let line = text.strip_suffix('\n').unwrap_or_else(|| panic!("not a line: {text:?}"));
        assert!(!line.contains('\n'), "more than one line: {text:?}");
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        check_shape(&value);
        value
    }
}

/// Asserts that the answer is `{"ok":true,"result"?}` or `{"ok":false,"reason"}` without other fields (wire specification,
/// A.1.1).
///
/// # Panics
/// If it is not.
#[track_caller]
pub fn check_shape(answer: &Value) {
    let fields = answer.as_object().unwrap_or_else(|| panic!("not an object: {answer}"));
    match fields.get("ok") {
        Some(Value::Bool(true)) => {
            assert!(fields.keys().all(|key| key == "ok" || key == "result"), "strange fields: {answer}");
        }
        Some(Value::Bool(false)) => {
            assert!(fields.len() == 2 && fields["reason"].is_string(), "no reason alone: {answer}");
        }
        _ => panic!("no ok: {answer}"),
    }
}

/// Sends `bytes` on a new connection and returns the only answer.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn exchange(home: &Home, bytes: impl AsRef<[u8]>) -> Value {
    let mut wire = Wire::connect(home);
    wire.send(bytes);
    wire.answer()
}

/// Sends one request and returns the answer.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn ask(home: &Home, request: &Value) -> Value {
    exchange(home, format!("{request}\n"))
}

/// Sends a request that must succeed, and returns its result (null without one).
///
/// # Panics
/// If it fails.
#[track_caller]
pub fn done(home: &Home, request: &Value) -> Value {
    let answer = ask(home, request);
    assert_eq!(answer["ok"], true, "{request}: {answer}");
    answer["result"].clone()
}

/// Sends a request that must be refused, and returns the reason.
///
/// # Panics
/// If it succeeds.
#[track_caller]
pub fn refused(home: &Home, request: &Value) -> String {
    let answer = ask(home, request);
    assert_eq!(answer["ok"], false, "{request}: {answer}");
    answer["reason"].as_str().unwrap().to_owned()
}

/// Registers a container with its name and its own folder only.
///
/// # Panics
/// If the daemon refuses.
#[track_caller]
pub fn register(home: &Home, name: &str) {
    register_with(home, name, &json!({}));
}

/// Registers a container with further fields.
///
/// # Panics
/// If the daemon refuses.
#[track_caller]
pub fn register_with(home: &Home, name: &str, fields: &Value) {
    let answer = ask(home, &registration(home, name, fields));
    assert_eq!(answer, json!({"ok": true}));
}

/// Returns a `register` request.
///
/// # Panics
/// If `fields` is not an object.
pub fn registration(home: &Home, name: &str, fields: &Value) -> Value {
    let mut request = json!({"kind": "register", "containerName": name, "cwd": home.folder(name)});
    request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    request
}

/// Returns the names in the answer of `list`, in its order.
///
/// # Panics
/// If the daemon does not answer.
#[track_caller]
pub fn names(home: &Home) -> Vec<String> {
    let result = done(home, &json!({"kind": "list"}));
    let registrations = result["registrations"].as_array().unwrap().iter();
    registrations.map(|entry| entry["containerName"].as_str().unwrap().to_owned()).collect()
}

/// Returns the port in the answer of `http-info`.
///
/// # Panics
/// If the daemon does not answer.
#[track_caller]
pub fn http_port(home: &Home) -> u16 {
    let result = done(home, &json!({"kind": "http-info"}));
    u16::try_from(result["port"].as_u64().unwrap()).unwrap()
}

/// Returns whether a daemon answers `list`.
pub fn answers(home: &Home) -> bool {
    let Ok(mut wire) = Wire::try_connect(home) else { return false };
    wire.try_send("{\"kind\":\"list\"}\n").is_ok() && wire.rest().contains("\"ok\":true")
}
