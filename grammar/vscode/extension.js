// Starts `rlhf lsp` and hands it to the editor; all that an editor shows about a recipe comes from there.
const { workspace } = require("vscode");
const { LanguageClient } = require("vscode-languageclient/node");

let client;

exports.activate = async () => {
  const [command, ...args] = workspace.getConfiguration("rlhf").get("command");
  const options = { documentSelector: [{ language: "rlhf" }] };
  client = new LanguageClient("rlhf", "rlhf", { command, args }, options);
  await client.start();
};

exports.deactivate = () => client && client.stop();
