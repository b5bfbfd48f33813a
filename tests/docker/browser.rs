//! A real browser: headless Chromium, driven with its DevTools protocol.

use std::net::{Ipv4Addr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tungstenite::{Message, WebSocket};

use super::engine::{page_at, until};

/// The timeout of one command.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// The browser. Dropping it ends the process.
pub(crate) struct Browser {
    child: Child,
    profile: TempDir,
}

impl Browser {
    /// Starts the browser with one empty tab.
    pub(crate) fn start() -> Browser {
        let profile = tempfile::Builder::new().prefix("landfall-chromium-").tempdir().unwrap();
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "chromium", "--headless", "--no-sandbox", "--disable-gpu"])
            .args([
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--no-proxy-server",
            ])
            .args(["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"])
            .args(["--remote-debugging-port=0", "about:blank"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(profile.path().join("stderr")).unwrap());
        Browser { child: command.spawn().unwrap(), profile }
    }

    /// Attaches to its tab.
    #[track_caller]
    pub(crate) fn tab(&mut self) -> Tab {
        let port: u16 = until("the browser to take part", || {
            assert_eq!(self.child.try_wait().unwrap(), None, "the browser ended: {}", self.printed());
            let reported = std::fs::read_to_string(self.profile.path().join("DevToolsActivePort"));
            let first = reported.ok().and_then(|text| text.lines().next()?.parse().ok());
            first.ok_or_else(|| self.printed())
        });
        let url = until("a tab", || {
            let list =
                page_at(Ipv4Addr::LOCALHOST.into(), port, "/json/list").map_err(|error| error.to_string())?;
            let tabs: Value = serde_json::from_str(&list).map_err(|error| format!("{error}: {list}"))?;
            let found = tabs.as_array().unwrap().iter().find(|tab| tab["type"] == "page");
            found.and_then(|tab| tab["webSocketDebuggerUrl"].as_str().map(str::to_owned)).ok_or(list)
        });
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_read_timeout(Some(ANSWER_MAX)).unwrap();
        let (socket, _) = tungstenite::client(url, stream).unwrap();
        Tab { socket, asked: 0 }
    }

    fn printed(&self) -> String {
        std::fs::read_to_string(self.profile.path().join("stderr")).unwrap_or_default()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A tab of the browser.
pub(crate) struct Tab {
    socket: WebSocket<TcpStream>,
    asked: u64,
}

impl Tab {
    /// Navigates to an address.
    #[track_caller]
    pub(crate) fn go(&mut self, url: &str) {
        let reported = self.call("Page.navigate", &json!({"url": url}));
        assert!(reported["errorText"].is_null(), "{url}: {reported}");
    }

    /// Returns the value of an expression in the page; null while one page replaces another.
    pub(crate) fn value(&mut self, expression: &str) -> Value {
        let asked = json!({"expression": expression, "returnByValue": true});
        self.call("Runtime.evaluate", &asked)["result"]["value"].clone()
    }

    /// Waits until an expression in the page has this value.
    #[track_caller]
    pub(crate) fn shows(&mut self, expression: &str, wanted: &Value) {
        until(&format!("{expression} to be {wanted}"), || match self.value(expression) {
            value if value == *wanted => Ok(()),
            value => Err((value, self.value("document.documentElement.outerHTML"))),
        });
    }

    fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.asked += 1;
        let question = json!({"id": self.asked, "method": method, "params": parameters});
        self.socket.send(Message::text(question.to_string())).unwrap();
        loop {
            // Events arrive between the answers.
            let Message::Text(text) = self.socket.read().unwrap() else { continue };
            let answer: Value = serde_json::from_str(&text).unwrap();
            if answer["id"] == self.asked {
                return answer["result"].clone();
            }
        }
    }
}
