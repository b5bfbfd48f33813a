//! A dev server in a container, on the container's own loopback, with a page open in a browser on the host.

use landfall_tests::Home;
use landfall_tests::case::Case;
use serde_json::json;

use super::browser::{Browser, Tab};
use super::engine::{Engine, LABEL, page, until, up};

pub(crate) const CASES: &[Case] = &[Case::once("vite_updates_an_open_page_also_after_a_restart", vite)];

const PORT: u16 = 5173;
const SHOWN: &str = "document.body && document.body.dataset.shown";

fn vite() {
    let home = Home::new();
    let mut browser = Browser::start();
    let engine = Engine::start(&home, &["node"]);
    up(&home, &[]);
    let command = ["node", "node_modules/vite/bin/vite.js", "--host", "127.0.0.1", "--strictPort"];
    engine.run("shop", &["--label", LABEL, "-w", "/app"], "node", &command);
    until("Vite's page", || match page(PORT, 0) {
        Ok(text) if text.contains("/@vite/client") => Ok(()),
        other => Err(other),
    });

    let mut tab = browser.tab();
    tab.go(&format!("http://localhost:{PORT}/"));
    tab.shows(SHOWN, &json!("first"));
    is_updated(&mut tab, &engine, "second");

    // Vite's client detects that its server is gone, waits until it answers again, and reloads the page.
    engine.docker(&["restart", "-t", "0", "shop"]);
    tab.shows("document.readyState === 'complete' && window.stays === undefined", &json!(true));
    tab.shows(SHOWN, &json!("second"));
    is_updated(&mut tab, &engine, "third");
}

/// Changes a file inside, and asserts that the page shows it without a reload: a variable that was set in the page is still
/// there.
#[track_caller]
fn is_updated(tab: &mut Tab, engine: &Engine<'_>, text: &str) {
    assert_eq!(tab.value("window.stays = 'here'"), "here");
    engine.exec("shop", &format!("echo \"export const text = '{text}';\" >/app/src/hot.js"));
    tab.shows(SHOWN, &json!(text));
    assert_eq!(tab.value("window.stays"), "here", "the page was reloaded");
}
