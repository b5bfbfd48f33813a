//! The arguments of `landfall trust`.

use std::path::PathBuf;

use clap::Args;

pub(super) const TRUST_NOTES: &str = "\
A container can often write to its folder, and a cloned folder holds files by other people. So
landfall.toml runs no command and devcontainer.json opens no port below 1024 until you have
approved exactly that content. `trust` prints what the files request and asks once. The approval is
stored in trust.json in landfall's home, never in the folder. A changed file needs a new approval.

Example: landfall trust ~/shop";

/// `landfall trust`
#[derive(Debug, Args)]
pub struct TrustArgs {
    /// The folder [default: the current folder]
    #[arg(value_name = "DIR", conflicts_with = "list")]
    pub folder: Option<PathBuf>,
    /// Print what the files request and whether they are approved, without changing anything
    #[arg(long, conflicts_with_all = ["revoke", "list", "yes"])]
    pub show: bool,
    /// Revoke the approval; running commands of the folder are killed
    #[arg(long, conflicts_with_all = ["list", "yes"])]
    pub revoke: bool,
    /// Approve without asking, for scripts
    #[arg(long, conflicts_with = "list")]
    pub yes: bool,
    /// List every approval
    #[arg(long)]
    pub list: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}
